"""The doctor on a model, data and checkpoint that are given by name."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normkit
from normkit._errors import nearest
from normkit.instruments import Diagnosis
from normkit.study.check import check_fit
from normkit.study.config import DoctorConfig
from normkit.study.data.batches import batches
from normkit.study.data.load import load_data
from normkit.study.environment import check_device
from normkit.study.errors import StudyError
from normkit.study.models import build_model

BATCHES = 8


def run_doctor(config: DoctorConfig) -> Diagnosis:
    """Build the model, load its weights and examine it.

    Raises:
        StudyError: Bad input.
    """
    if config.method not in normkit.recipes():
        raise StudyError(f"--method: unknown method {config.method!r}; {nearest(config.method, normkit.recipes())}")
    for flag, count in (("--batch-size", config.batch_size), ("--accumulate", config.accumulate)):
        if count < 1:
            raise StudyError(f"{flag} {count}: give at least 1")
    check_device(config.device)
    try:
        data = load_data(config.data, limit=config.limit)
        model = build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device)
    except ValueError as error:
        raise StudyError(f"--data, --model: {error}") from error
    check_fit(config.model, model, data, config.device)
    budget = BATCHES * config.batch_size
    stream = batches(data, data.train, batch_size=config.batch_size, budget=budget, seed=0, device=config.device)
    samples = list(islice(stream, BATCHES))
    model, optimizer = normkit.apply(
        config.method,
        model,
        lr=normkit.recipes()[config.method].lr,
        weight_decay=config.weight_decay,
        batches=[inputs for inputs, _ in samples],
    )
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return cross_entropy(model(inputs), labels)

    return normkit.doctor(model, objective, samples, optimizer=optimizer, accumulate=config.accumulate)


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a state dict, bare or under ``model`` or ``state_dict`` in a dictionary.

    Args:
        model: The model, changed in place.
        file: What ``torch.save`` wrote.

    Raises:
        StudyError: The file cannot be read, or does not fit the model.
    """
    try:
        saved: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StudyError(f"--checkpoint {file}: there is no such file") from error
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StudyError(f"--checkpoint {file}: cannot be read ({reason}); give a state dict by torch.save") from error
    for key in ("model", "state_dict"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict):
        raise StudyError(f"--checkpoint {file}: holds a {type(saved).__name__}; give a state dict")
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        odd = sorted(set(saved) ^ set(model.state_dict()))[:3]
        what = f"keys differ, for example {', '.join(map(repr, odd))}" if odd else str(error).splitlines()[-1].strip()
        raise StudyError(
            f"--checkpoint {file}: does not fit the model ({what}); give the --model and --method it was trained with"
        ) from error
