"""What can be wrong with a study is found before its first run: data, model and device are tried once."""

import torch
from torch import nn

from normkit.study.alike import same_networks
from normkit.study.data.dataset import Data
from normkit.study.environment import check_device
from normkit.study.errors import StudyError
from normkit.study.factory import is_factory
from normkit.study.models import build_model
from normkit.study.plan import StudyConfig, validate
from normkit.study.train.trial import load

MOST_CLASSES = 100  # per training example: what has more is no class number


def check(config: StudyConfig) -> Data:
    """Load the data and try the model on it, so that a mistake ends the study before it begins.

    Raises:
        StudyError: Data or model cannot be used as given.
    """
    validate(config)
    check_device(config.device)
    try:
        data = load(config)
    except StudyError:
        raise
    except ValueError as error:
        raise StudyError(f"--data: {error}") from error
    for size in config.batch_sizes:
        if size > len(data.train):
            raise StudyError(
                f"--batch-sizes: {size} is larger than the training split of {len(data.train)} examples; give less"
            )
    _check_classes(config, data)
    model = _built(config, data)
    if config.augmentation and (len(data.input_shape) != 3 or config.crop >= min(data.input_shape[1:])):
        raise StudyError(
            f"--flip, --crop: --data {config.data} has inputs of shape {data.input_shape}; they need images "
            "larger than the crop"
        )
    check_fit(config.model, model, data, config.device)
    alike = same_networks(config.methods, model)
    if alike:
        raise StudyError(
            f"--methods: {', '.join(alike)} would all train --model {config.model} as it is, since it has no batch normalization "
            "that they could exchange; give a model with batch normalization, or keep one of them"
        )
    weights = {id(p) for p in model.parameters() if p.requires_grad}
    if not weights:
        raise StudyError(f"--model {config.model}: has no weights that are trained; give a model with some")
    if is_factory(config.model) and weights & {id(p) for p in _built(config, data).parameters()}:
        raise StudyError(
            f"--model {config.model}: the factory returned the same weights twice, which the trials would train on and on; "
            "it must build a new model with every call"
        )
    return data


def check_fit(name: str, model: nn.Module, data: Data, device: str) -> None:
    """Try a model on two examples.

    Args:
        name: What the user called it.
        model: The model, left as it was.
        data: The data.
        device: Where the model is.

    Raises:
        StudyError: It cannot take them, or does not give logits of their classes.
    """
    sample = data.normalise(data.train.examples(slice(2))[0].to(device))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(sample)
        model.train(was_training)
    except Exception as error:
        raise StudyError(
            f"--model {name}: cannot take inputs of shape {tuple(sample.shape)} from --data {data.name} "
            f"({type(error).__name__}: {error}); give a model that fits the data"
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape != (len(sample), data.classes):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise StudyError(
            f"--model {name}: its output is {found} where --data {data.name} with {data.classes} classes needs "
            f"{(len(sample), data.classes)}; build the model with `classes` outputs"
        )


def _check_classes(config: StudyConfig, data: Data) -> None:
    if len(data.train.labels.unique()) < 2:
        raise StudyError(f"--data {config.data}: all training examples are of one class; give examples of two or more")
    if data.classes > MOST_CLASSES * len(data.train):
        raise StudyError(
            f"--data {config.data}: its {len(data.train)} training examples have labels up to {data.classes - 1}; number the "
            "classes 0, 1, 2 ..."
        )


def _built(config: StudyConfig, data: Data) -> nn.Module:
    try:
        return build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device)
    except ValueError as error:
        raise StudyError(f"--model: {error}") from error
