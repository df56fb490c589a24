"""Fingerprints of data and model, so that a study never mixes results of different ones under the same name.

The fingerprint of the first start is kept beside the trials and compared at every later start, on every machine.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from normkit.study.config import StudyConfig
from normkit.study.data.dataset import Data, Split
from normkit.study.errors import StudyError
from normkit.study.models import build_model
from normkit.study.store.store import Store
from normkit.study.train.trial import seed_all

LOOKED_AT = 32  # examples of each split
RELATIVE, ABSOLUTE = 1e-2, 1e-4  # decoders, processors and versions differ by less


def check_fingerprint(store: Store, config: StudyConfig, data: Data) -> None:
    """Keep the fingerprint of data and model in a new study, and refuse to resume it with other ones.

    Raises:
        StudyError: Data or model have changed since the study began.
    """
    found, kept = fingerprint(config, data), store.get_attr("identity")
    if kept is None:
        store.set_attr("identity", found)
        return
    for what, name in (("data", config.data), ("model", config.model)):
        if not _equal(kept[what], found[what]):
            raise StudyError(
                f"--{what} {name}: has changed since this study began, and its results would be mixed; give another --out, "
                f"or the {what} as it was"
            )


@torch.no_grad()
def fingerprint(config: StudyConfig, data: Data) -> dict[str, Any]:
    """Return the fingerprint: labels and some examples of the data; layers and untrained output of the model."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    seed_all(0)
    model = build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device).eval()
    output = model(data.normalise(data.train.examples(slice(2))[0].to(config.device)))
    layers = [(path, type(module).__name__) for path, module in model.named_modules()]
    shapes = [(path, tuple(tensor.shape)) for path, tensor in model.state_dict().items()]
    return {
        "data": {role: _of_split(split) for role, split in splits.items() if split is not None},
        "model": {"layers": _digest(repr((layers, shapes)).encode()), "output": output.double().flatten().tolist()},
    }


def _of_split(split: Split) -> dict[str, Any]:
    chosen = torch.arange(0, len(split), max(1, len(split) // LOOKED_AT))[:LOOKED_AT]
    labels: Tensor = split.labels.cpu()
    inputs, _ = split.examples(chosen.to(split.labels.device))
    return {
        "labels": _digest(labels.numpy().tobytes()),
        "shape": list(inputs.shape[1:]),
        "means": inputs.double().flatten(1).mean(1).tolist(),
    }


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _equal(kept: Any, found: Any) -> bool:
    if isinstance(kept, dict):
        return kept.keys() == found.keys() and all(_equal(kept[key], found[key]) for key in kept)
    if isinstance(kept, list):
        return len(kept) == len(found) and all(map(_equal, kept, found))
    if isinstance(kept, float):
        return math.isclose(kept, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (math.isnan(kept) and math.isnan(found))
    return kept == found
