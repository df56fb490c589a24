"""The doctor on a task, or a model and data, and a checkpoint that are given by name."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import normkit
from normkit._errors import nearest
from normkit.instruments import Diagnosis
from normkit.study.check import build, check_task
from normkit.study.config import DoctorConfig
from normkit.study.environment import check_device
from normkit.study.errors import StudyError
from normkit.study.load import load_unsplit
from normkit.study.task import length

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
    saved = read_weights(config.checkpoint) if config.checkpoint is not None else None
    task = load_unsplit(config)
    most = max(length(task.train), DoctorConfig.batch_size)  # the default repeats samples of small data
    if config.batch_size > most:
        raise StudyError(
            f"--batch-size {config.batch_size}: is larger than the training split of {length(task.train)} examples; give less"
        )
    model = build(task, config.device)
    check_task(task, model, config.device)
    size = config.batch_size
    stream = task.training_batches(batch_size=size, budget=BATCHES * size, seed=0, device=config.device)
    samples = [micro.batch for (micro,) in stream]
    try:
        model, optimizer = normkit.apply(
            config.method,
            model,
            lr=normkit.recipes()[config.method].lr,
            weight_decay=config.weight_decay,
            batches=map(task.first_of, samples),
        )
    except ValueError as error:
        raise StudyError(f"--method {config.method}: {error}") from error
    if saved is not None and config.checkpoint is not None:
        load_weights(model, saved, config.checkpoint)
    try:
        return normkit.doctor(model, task.loss, samples, optimizer=optimizer, accumulate=config.accumulate)
    except Exception as error:  # of the model or the loss, both the user's
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StudyError(f"{task.data_label}: the model cannot be examined: {text}") from error


def read_weights(file: Path) -> dict[str, Any]:
    """Read a state dict, bare or under ``model`` or ``state_dict`` in a dictionary.

    Args:
        file: What ``torch.save`` wrote.

    Raises:
        StudyError: The file cannot be read, or holds something else.
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
    return saved


def load_weights(model: nn.Module, saved: dict[str, Any], file: Path) -> None:
    """Load a state dict.

    Args:
        model: The model, changed in place.
        saved: The state dict.
        file: Where it is from.

    Raises:
        StudyError: It does not fit the model.
    """
    try:
        model.load_state_dict(saved)
    except (RuntimeError, TypeError, AttributeError) as error:
        odd = sorted({*map(str, saved)} ^ set(model.state_dict()))[:3]
        what = f"keys differ, for example {', '.join(map(repr, odd))}" if odd else str(error).splitlines()[-1].strip()
        raise StudyError(
            f"--checkpoint {file}: does not fit the model ({what}); give the --model and --method it was trained with"
        ) from error
