"""Behind the same name a user's data and model can change between two starts of a study, or between two machines.

What they were when the study began is kept beside its trials, and compared at every later start.
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
    """Keep what data and model are in a study that begins; refuse others in one that goes on.

    Raises:
        StudyError: Data or model are not what they were when the study began.
    """
    found, kept = identity(config, data), store.get_attr("identity")
    if kept is None:
        store.set_attr("identity", found)
        return
    for what, name in (("data", config.data), ("model", config.model)):
        if not _alike(kept[what], found[what]):
            raise StudyError(
                f"--{what} {name}: is not what it was when this study began, whose results would be mixed; give another --out, "
                f"or the {what} as it was"
            )


@torch.no_grad()
def identity(config: StudyConfig, data: Data) -> dict[str, Any]:
    """What data and model are, as plain data: labels and some examples; layers, and the untrained model's output."""
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


def _alike(kept: Any, found: Any) -> bool:
    if isinstance(kept, dict):
        return kept.keys() == found.keys() and all(_alike(kept[key], found[key]) for key in kept)
    if isinstance(kept, list):
        return len(kept) == len(found) and all(map(_alike, kept, found))
    if isinstance(kept, float):
        return math.isclose(kept, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (math.isnan(kept) and math.isnan(found))
    return kept == found
