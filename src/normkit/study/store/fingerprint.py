"""Fingerprints of data and model, so that a study never mixes results of different ones under the same name.

The fingerprint of the first start is kept beside the trials and compared at every later start, on every machine.
"""

import hashlib
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.inspection.forward import run_batch
from normkit.study.config import StudyConfig
from normkit.study.data.dataset import Split, TensorSamples
from normkit.study.data.samples import Fetcher, Request, fetched
from normkit.study.data.sampling import seed_all
from normkit.study.data.structure import leaves, tensors
from normkit.study.errors import StudyError
from normkit.study.store.store import Store
from normkit.study.task import Task, length
from normkit.study.train.checkpoint import alike

LOOKED_AT = 32  # examples of each split
MOST_VALUES = 10_000  # of an output; of a larger one the mean is kept
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def check_fingerprint(store: Store, config: StudyConfig, task: Task) -> None:
    """Keep the fingerprint of data and model in a new study, and refuse to resume it with other ones.

    A kept value that is no fingerprint is replaced, and the log says so.

    Raises:
        StudyError: Data or model have changed since the study began.
    """
    found, kept = fingerprint(task, config.device), store.get_attr("identity", _read)
    if kept is None:
        store.set_attr("identity", found)
        return
    for what, label in (("data", task.data_label), ("model", task.model_label)):
        looked_at = {key: found[what].get(key) for key in kept[what]}  # an earlier version may have looked at less
        if not alike(kept[what], looked_at):
            raise StudyError(
                f"{label}: has changed since this study began, and its results would be mixed; give another --out, "
                f"or the {what} as it was"
            )


def check_same_data(store: Store, task: Task) -> None:
    """Refuse to train in a process whose data are not those of the study: drawn anew with every import, without a seed.

    Raises:
        StudyError: They are others.
    """
    kept, found = store.get_attr("identity", _read), fingerprint_of_data(task)
    if kept is not None and not alike(kept["data"], {role: found.get(role) for role in kept["data"]}):
        raise StudyError(
            f"{task.data_label}: has other samples in every process; draw them from generators with a seed, so that all methods "
            "train on the same ones"
        )


def fingerprint_of_data(task: Task) -> dict[str, Any]:
    """The part of the fingerprint that is of the data."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    return {role: _of_split(split, role) for role, split in splits.items() if split is not None}


def fingerprint(task: Task, device: str) -> dict[str, Any]:
    """Return the fingerprint: some samples of the data, and labels; layers and untrained output of the model.

    Args:
        task: The task.
        device: Where the model runs.
    """
    seed_all(0)
    model = task.model().to(device)
    layers = [(path, type(module).__name__) for path, module in model.named_modules()]
    single = [(path, repr(module)) for path, module in model.named_modules() if next(module.children(), None) is None]
    shapes = [(path, tuple(tensor.shape)) for path, tensor in model.state_dict().items()]
    output = _untrained_output(task, model, device)
    return {
        "data": fingerprint_of_data(task),
        "model": {
            "layers": _digest(repr((layers, shapes)).encode()),
            "settings": _digest(_ADDRESS.sub("", repr(single)).encode()),
            "output": output,
        },
    }


@torch.no_grad()
def _untrained_output(task: Task, model: nn.Module, device: str) -> list[float]:
    """The output on two samples; the loss where the model cannot be called with inputs alone."""
    batch = task.first_batch(2, device)
    try:
        found = tensors(run_batch(model.eval(), task.first_of(batch)))
    except Exception:
        found = [task.loss(model.train(), batch)]
    parts = [tensor.double().flatten() for tensor in found]
    return [value for part in parts for value in (part if len(part) <= MOST_VALUES else part.mean()[None]).tolist()]


def _read(kept: Any) -> dict[str, dict[str, Any]]:
    if not kept["data"] or not kept["model"]:
        raise ValueError("it is empty")
    return {"data": {**kept["data"]}, "model": {**kept["model"]}}


def _of_split(dataset: Any, role: str) -> dict[str, Any]:
    total = length(dataset)
    chosen = range(0, total, max(1, total // LOOKED_AT))[:LOOKED_AT]
    if isinstance(dataset, TensorSamples):
        return _of_tensors(dataset.split, torch.tensor(chosen))
    fetcher = Fetcher(dataset, role, collate=list)
    (samples, _), *_ = next(fetched(fetcher, iter([Request(0, (tuple(chosen),))])))
    described = [_of_leaf(leaf) for sample in samples for _, leaf in leaves(sample)]
    return {"samples": total, "leaves": described}


def _of_leaf(leaf: Any) -> float | str:
    """The mean of what is an array or a number, a digest of text, else the type."""
    if isinstance(leaf, str | bytes):
        return _digest(leaf if isinstance(leaf, bytes) else leaf.encode())
    try:
        return float(np.mean(np.asarray(leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, dtype=np.float64)))
    except (TypeError, ValueError):
        return type(leaf).__name__


def _of_tensors(split: Split, chosen: Tensor) -> dict[str, Any]:
    labels: Tensor = split.labels.cpu()
    inputs, _ = split.examples(chosen.to(split.labels.device))
    return {
        "labels": _digest(labels.numpy().tobytes()),
        "shape": list(inputs.shape[1:]),
        "means": inputs.double().flatten(1).mean(1).tolist(),
    }


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()
