"""Data by name: the embedded digits, a generated spiral, a user's factory, or any Hugging Face data set."""

from collections.abc import Mapping
from dataclasses import replace
from math import pi
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit._errors import closest
from normkit.study.data.dataset import Data, Split, make_data
from normkit.study.data.images import load_images
from normkit.study.data.sampling import generator, stratified
from normkit.study.errors import DataError, FactoryError
from normkit.study.factory import is_factory, load_factory

MOST_CLASSES = 10**8  # what is larger is an identifier, and counting classes would take all memory


def load_data(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    train_split: str = "train",
    limit: int | None = None,
) -> Data:
    """Load data by name.

    Args:
        name: ``digits`` (embedded), ``spiral`` (generated), ``package.module:factory`` or ``path/to/file.py:factory``,
            a local folder, or a data set of the Hugging Face hub (``name`` or ``name@configuration``).
            A factory takes no argument and returns ``(train, validation, test)``, each a ``torch.utils.data.Dataset``
            of (input, label) or a pair of tensors; validation may be None.
        image_column: Column with the images, for hub and local data; found by its type when there is one only.
        label_column: Column with the classes; likewise.
        image_size: Bring images to this height and width (shorter side resized, centre cut out).
        train_split: Split that trains, or several joined by +, for hub and local data.
        limit: At most this many examples of each split, classes in proportion.

    Returns:
        The data, uint8 inputs for images.

    Raises:
        DataError: There is no such data, or it cannot be used.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit} leaves no data; give a positive number of examples")
    hub = not (name in _BUILT_IN or is_factory(name))
    if not hub and (image_column, label_column, image_size, train_split) != (None, None, None, "train"):
        raise DataError(
            f"{name!r} has no columns, image files or splits to choose from; drop image_column, label_column, image_size and "
            "train_split"
        )
    if hub:
        try:
            how = {"image_column": image_column, "label_column": label_column, "size": image_size, "limit": limit}
            return load_images(name, train_split=train_split, **how)
        except DataError as error:
            near = closest(name, _BUILT_IN)
            if near is None:
                raise
            raise DataError(f"{error}; did you mean {near!r}?") from error
    data = _BUILT_IN[name]() if name in _BUILT_IN else _from_factory(name)
    return data if limit is None else _limited(data, limit)


def _limited(data: Data, limit: int) -> Data:
    def first(split: Split) -> Split:
        return split if len(split) <= limit else split.take(stratified(split.labels, limit, 0))

    validation = first(data.validation) if data.validation is not None else None
    return replace(data, train=first(data.train), test=first(data.test), validation=validation)


def _digits() -> Data:
    # The 1,797 real handwritten 8x8 digits that ship with scikit-learn, three quarters of each class for training.
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data 'digits' comes with scikit-learn; install normkit[study]") from error
    images, labels = load_digits(return_X_y=True)
    whole = Split(torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8), torch.from_numpy(labels).long())
    test = stratified(whole.labels, 450, 0)
    keep = torch.ones(len(whole), dtype=torch.bool)
    keep[test] = False
    return make_data("digits", whole.take(keep.nonzero().squeeze(1)), whole.take(test))


def spiral(count: int, seed: int, noise: float = 0.2) -> Split:
    """Three interleaved arms in the plane, one class each; noise is on the angle, in radians."""
    rng = generator(seed, "spiral")
    labels = torch.arange(count) % 3
    radius = torch.rand(count, generator=rng)
    angle = 4 * radius + labels * (2 * pi / 3) + noise * torch.randn(count, generator=rng)
    return Split(2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1), labels)


def _spiral() -> Data:
    return make_data("spiral", spiral(1500, 0), spiral(1500, 1), note="generated data")


_BUILT_IN = {"digits": _digits, "spiral": _spiral}


def _from_factory(name: str) -> Data:
    try:
        made = load_factory(name, "data")()
    except FactoryError as error:
        raise DataError(str(error)) from error
    except (Exception, SystemExit) as error:
        raise DataError(f"data {name!r}: the factory raised {type(error).__name__}: {error}") from error
    if isinstance(made, Data):
        return made
    if not isinstance(made, (tuple, list)) or len(made) != 3:
        raise DataError(
            f"data {name!r}: the factory returned {_described(made)}; it must return (train, validation, test), each a "
            "Dataset of (input, label) or a pair of tensors, validation may be None"
        )
    splits = [
        None if part is None else _split(part, f"data {name!r}: {role}")
        for role, part in zip(_ROLES, made, strict=True)
    ]
    train, validation, test = splits
    if train is None or test is None:
        raise DataError(f"data {name!r}: {'train' if train is None else 'test'} is None; only validation may be None")
    for role, split in (("validation", validation), ("test", test)):
        if split is not None and split.stored.shape[1:] != train.stored.shape[1:]:
            shapes = f"{tuple(split.stored.shape[1:])} instead of train's {tuple(train.stored.shape[1:])}"
            raise DataError(f"data {name!r}: {role} inputs have shape {shapes}; make them alike")
    return make_data(name, train, test, validation=validation)


_ROLES = ("train", "validation", "test")


def _described(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, (tuple, list, Mapping)) else f"a {type(value).__name__}"


def _split(part: Any, where: str) -> Split:
    # A Dataset of (input, label), or a pair of tensors or arrays, as tensors.
    if isinstance(part, Split):
        part = (part.inputs, part.labels)
    try:
        if (
            isinstance(part, (tuple, list))
            and len(part) == 2
            and all(isinstance(t, (Tensor, np.ndarray)) for t in part)
        ):
            inputs, labels = map(torch.as_tensor, part)
        else:
            pairs = [part[i] for i in range(len(part))]
            inputs = torch.stack([torch.as_tensor(x) for x, _ in pairs])
            labels = torch.stack([torch.as_tensor(y).reshape(()) for _, y in pairs])
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{where}: could not be read as (input, label) pairs of one shape ({type(error).__name__}: {error}); "
            "give a Dataset with a length whose items are (tensor, class number), or a pair of tensors"
        ) from error
    _check_tensors(inputs, labels, where)
    try:
        if inputs.dtype != torch.uint8:
            inputs = inputs.float()
        return Split(inputs.contiguous(), labels.long())
    except (RuntimeError, MemoryError) as error:
        raise DataError(
            f"{where}: inputs {tuple(inputs.shape)} do not fit into memory; give fewer, or images as a folder, which are read "
            "from the disk"
        ) from error


def _check_tensors(inputs: Tensor, labels: Tensor, where: str) -> None:
    for what, tensor in (("inputs", inputs), ("labels", labels)):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
            kind = f"{tensor.layout} tensor of {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise DataError(f"{where}: {what} are a {kind}; give dense real numbers with values")
    if inputs.dim() < 2 or labels.dim() != 1 or len(inputs) != len(labels) or inputs.numel() == 0:
        raise DataError(
            f"{where}: inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)}; give inputs (N, ...) and labels "
            "(N,), N > 0"
        )
    if labels.dtype.is_floating_point or int(labels.min()) < 0:
        raise DataError(
            f"{where}: labels must be class numbers 0, 1, 2 ... (got {labels.dtype}, minimum {labels.min().item()})"
        )
    if int(labels.max()) >= MOST_CLASSES:
        raise DataError(f"{where}: labels go up to {int(labels.max())}; number the classes 0, 1, 2 ...")
    try:
        finite = not inputs.is_floating_point() or all(bool(torch.isfinite(part).all()) for part in inputs.split(1024))
    except (RuntimeError, MemoryError):
        return  # not enough memory, which is said when they are copied
    if not finite:
        raise DataError(f"{where}: inputs contain NaN or infinity; clean them")
