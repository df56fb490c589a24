"""One training run: deterministic, and without a method's name anywhere in the loop.

The same key gives the same result bit for bit on a CPU, however many trials run beside it: one torch thread, weights and
data order from the seed alone.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normkit
from normkit.study.config import StudyConfig
from normkit.study.data.batches import batches
from normkit.study.data.dataset import Data
from normkit.study.data.load import load_data
from normkit.study.errors import DataError, StudyError
from normkit.study.factory import is_factory
from normkit.study.models import build_model
from normkit.study.records import CurvePoint, TrialKey, TrialResult
from normkit.study.train.checkpoint import CheckpointFile
from normkit.study.train.loop import Diverged, Loop, evaluate, from_first, ranks

INITIAL_EXAMPLES = 256  # for methods that start from data
GAP_EXAMPLES = 1024  # for the train/eval gap
RESIDENT_SHARE = 0.25  # of a GPU's free memory that data may take, to be there from the start


def load(config: StudyConfig) -> Data:
    """The data of a study with a validation split, on the training device if it takes little of its memory.

    Raises:
        DataError: The data cannot be used.
        StudyError: It leaves no example to train or to validate on.
    """
    if is_factory(config.data):  # one that draws its examples, or its splits, gives every process the same
        seed_all(0)
    data = load_data(
        config.data,
        image_column=config.image_column,
        label_column=config.label_column,
        image_size=config.image_size,
        limit=config.limit,
    )
    amount = config.validation if config.validation < 1 else int(config.validation)
    try:
        train, validation = data.split_validation(amount)
    except DataError as error:
        raise StudyError(f"--validation {config.validation:g}: {error}") from error
    data = replace(data, train=train, validation=validation)
    if config.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(config.device)
        if sum(split.nbytes for split in (train, validation, data.test)) < RESIDENT_SHARE * free:
            return data.to(config.device)
    return data


def seed_all(seed: int) -> None:
    """Seed the random number generators that a user's factory may draw from: Python's, NumPy's and torch's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_trial(config: StudyConfig, key: TrialKey, data: Data) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer of a trial; the weights depend on the seed alone, so methods share them where shapes agree."""
    seed_all(key.seed)
    model = build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device)
    first = batches(data, data.train, batch_size=64, budget=INITIAL_EXAMPLES, seed=key.seed, device=config.device)
    return normkit.apply(
        key.method,
        model,
        lr=key.lr,
        batches=[inputs for inputs, _ in first],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
    )


@torch.no_grad()
def train_eval_gap(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss in eval mode minus in train mode on the same batches, in nats; the model is left as it was."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    losses: dict[bool, float] = {}
    for mode in (True, False):
        model.train(mode)
        losses[mode] = sum(float(cross_entropy(model(x).float(), y)) for x, y in batches) / len(batches)
        for buffer, before in buffers:
            buffer.copy_(before)
    model.train(training)
    return losses[False] - losses[True]


def run_trial(
    config: StudyConfig,
    key: TrialKey,
    data: Data,
    *,
    folder: Path | None = None,
    on_point: Callable[[CurvePoint], bool] | None = None,
) -> TrialResult:
    """Train and evaluate once; what goes wrong is in the result, never raised.

    Of several ranks one that fails does raise, since only its end makes the launcher end the others.

    Args:
        config: The study.
        key: Which run.
        data: What ``load`` returned.
        folder: Folder of checkpoints; an interrupted run resumes from its last one, exactly.
        on_point: Called with each point of the curve; when it returns True the run is given up as ``pruned``.

    Returns:
        The result.
    """
    checkpoint = CheckpointFile(folder, _name(config, key), writes=ranks()[0] == 0) if folder is not None else None
    loop: Loop | None = None

    def ended(state: str, **values: float | str | None) -> TrialResult:
        if checkpoint is not None:
            checkpoint.remove()
        times = {} if loop is None else {"seconds": loop.seconds, "validation_seconds": loop.validation_seconds}
        return TrialResult(key, state, curve=tuple(loop.curve) if loop is not None else (), **times, **values)  # type: ignore[arg-type]

    try:
        model, optimizer = build_trial(config, key, data)
        loop = Loop(config, key, data, model, optimizer)
        saved = from_first(checkpoint.load()) if checkpoint is not None else None
        if saved is not None:
            loop.load_state_dict(saved)
        for point in loop.points(checkpoint):
            if on_point is not None and on_point(point):
                return ended("pruned", error=f"given up after {point.examples} examples: below the median")
        return ended("finished", **evaluate_trial(config, key, data, loop))
    except Diverged as error:
        return ended("diverged", error=str(error))
    except Exception as error:  # the study goes on; the report shows the line
        if ranks()[1] > 1:  # the other ranks wait for this one: only its end makes the launcher end them too
            raise
        return ended("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])


def evaluate_trial(config: StudyConfig, key: TrialKey, data: Data, loop: Loop) -> dict[str, float | None]:
    """Evaluate the final weights of a run: on the validation split, and of a final run once on the test split.

    Args:
        config: The study.
        key: Which run.
        data: Its data.
        loop: The run, at its end.

    Returns:
        The figures of :class:`~normkit.study.records.TrialResult`, by name.

    Raises:
        Diverged: The validation loss is not finite.
    """
    model = loop.model
    assert data.validation is not None
    with loop.final_weights():
        accuracy, loss = evaluate(model, data, data.validation, config)
        test_accuracy, test_loss = evaluate(model, data, data.test, config) if key.phase == "final" else (None, None)
    if not math.isfinite(loss):
        raise Diverged("the validation loss is not finite")
    budget = min(GAP_EXAMPLES, 64 * key.batch_size) // key.batch_size * key.batch_size
    sample = batches(data, data.train, batch_size=key.batch_size, budget=budget, seed=key.seed, device=config.device)
    return {
        "validation_accuracy": accuracy,
        "validation_loss": loss,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "train_eval_gap": train_eval_gap(model, list(sample)),
        "best_step": loop.best.step if loop.best is not None else None,
    }


def _name(config: StudyConfig, key: TrialKey) -> str:
    """File name of a trial's checkpoint: studies in one folder never meet."""
    text = json.dumps([config.to_dict(), asdict(key)], sort_keys=True)
    return f"{key.method}-{key.batch_size}-{key.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
