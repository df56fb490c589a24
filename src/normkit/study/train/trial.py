"""One training run: deterministic, and without a method's name anywhere in the loop.

The same key gives the same result bit for bit on a CPU, however many trials run beside it: one torch thread, weights and
data order from the seed alone.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import normkit
from normkit.study.config import StudyConfig
from normkit.study.data.sampling import seed_all
from normkit.study.methods import parse_method
from normkit.study.records import CurvePoint, TrialKey, TrialResult
from normkit.study.task import Batch, Loss, Task
from normkit.study.train.checkpoint import CheckpointFile
from normkit.study.train.loop import Diverged, Loop, evaluate_once, from_first, ranks

logger = logging.getLogger(__name__)

INITIAL_SAMPLES = 256  # for methods that start from data and are not told how many
GAP_EXAMPLES = 1024  # for the train/eval gap


def build_trial(config: StudyConfig, key: TrialKey, task: Task) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer of a trial; the weights depend on the seed alone, so methods share them where shapes agree."""
    seed_all(key.seed)
    method, options = parse_method(key.method)
    return normkit.apply(
        method,
        task.model().to(config.device),
        lr=key.lr,
        batches=task.initial_inputs(
            seed=key.seed,
            device=config.device,
            most=config.most_at_once,
            samples=options.get("samples", INITIAL_SAMPLES),
        ),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        options=options,
    )


@torch.no_grad()
def train_eval_gap(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Mean loss in eval mode minus in train mode on the same batches; the model is left as it was.

    Args:
        model: The model.
        batches: Batches of equal size.
        loss: ``loss(model, batch)``.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    losses: dict[bool, float] = {}
    try:
        for mode in (True, False):
            model.train(mode)
            losses[mode] = sum(float(loss(model, batch)) for batch in batches) / len(batches)
            for buffer, before in buffers:
                buffer.copy_(before)
    finally:
        model.train(training)
    return losses[False] - losses[True]


def run_trial(
    config: StudyConfig,
    key: TrialKey,
    task: Task,
    *,
    folder: Path | None = None,
    fingerprint: Any = None,
    on_point: Callable[[CurvePoint], bool] | None = None,
) -> TrialResult:
    """Train and evaluate once; what goes wrong is in the result, never raised.

    Of several ranks one that fails does raise, since only its end makes the launcher end the others.

    Args:
        config: The study.
        key: Which run.
        task: Its task, with a validation split.
        folder: Folder of checkpoints; an interrupted run resumes from its last one, exactly.
        fingerprint: Fingerprint of data and model; a checkpoint with another one counts as absent.
        on_point: Called with each point of the curve; when it returns True the run is given up as ``pruned``.

    Returns:
        The result.

    Raises:
        SystemExit: As any error, of one of several ranks.
    """
    checkpoint = None
    if folder is not None:
        revision = normkit.recipes()[parse_method(key.method)[0]].revision
        run = {"study": config.to_dict(), "trial": asdict(key), "revision": revision}
        checkpoint = CheckpointFile(folder, _name(config, key), run, fingerprint, writes=ranks()[0] == 0)
    loop: Loop | None = None

    def ended(state: str, **values: float | str | None) -> TrialResult:
        if checkpoint is not None:
            checkpoint.remove()
        times = {} if loop is None else {"seconds": loop.seconds, "validation_seconds": loop.validation_seconds}
        return TrialResult(key, state, curve=tuple(loop.curve) if loop is not None else (), **times, **values)  # type: ignore[arg-type]

    try:
        model, optimizer = build_trial(config, key, task)
        loop = Loop(config, key, task, model, optimizer)
        saved = from_first(checkpoint.load()) if checkpoint is not None else None
        if saved is not None and not _resumed(loop, saved):
            model, optimizer = build_trial(config, key, task)
            loop = Loop(config, key, task, model, optimizer)
        for point in loop.points(checkpoint):
            if on_point is not None and on_point(point):
                return ended("pruned", error=f"given up after {point.examples} examples: below the median")
        return ended("finished", **evaluate_trial(config, key, task, loop))
    except Diverged as error:
        return ended("diverged", error=str(error))
    except (Exception, SystemExit) as error:  # the study goes on; the report shows the line
        if ranks()[1] > 1:  # the other ranks wait for this one: only its end makes the launcher end them too
            raise
        return ended("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])


def _resumed(loop: Loop, saved: dict[str, Any]) -> bool:
    """Load a checkpoint; False if it does not fit, after which the loop is of no use."""
    try:
        loop.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        logger.warning("a checkpoint does not fit (%s): this run starts anew", str(error).partition("\n")[0])
        return False
    return True


def evaluate_trial(config: StudyConfig, key: TrialKey, task: Task, loop: Loop) -> dict[str, float | None]:
    """Evaluate the final weights of a run: on the validation split, and of a final run once on the test split.

    Args:
        config: The study.
        key: Which run.
        task: Its task.
        loop: The run, at its end.

    Returns:
        The figures of :class:`~normkit.study.records.TrialResult`, by name.

    Raises:
        Diverged: The validation loss or score is not finite.
    """
    model = loop.model
    with loop.final_weights():
        score, loss = evaluate_once(model, task, "validation", config)
        final = key.phase == "final"
        test_score, test_loss = evaluate_once(model, task, "test", config) if final else (None, None)
    if loss is not None and not math.isfinite(loss):
        raise Diverged("the validation loss is not finite")
    return {
        "validation_score": score,
        "validation_loss": loss,
        "test_score": test_score,
        "test_loss": test_loss,
        "train_eval_gap": _gap(config, key, task, model),
        "best_step": loop.best.step if loop.best is not None else None,
    }


def _gap(config: StudyConfig, key: TrialKey, task: Task, model: nn.Module) -> float | None:
    """The train/eval gap; None where the model gives no loss in eval mode, as some detectors do."""
    budget = min(GAP_EXAMPLES, 64 * key.batch_size) // key.batch_size * key.batch_size
    how = {
        "batch_size": key.batch_size,
        "budget": budget,
        "seed": key.seed,
        "device": config.device,
        "augmented": False,
    }
    sample = task.training_batches(**how)
    try:
        return train_eval_gap(model, [micro.batch for (micro,) in sample], task.loss)
    except Exception as error:
        logger.debug("no train/eval gap of %s: %s: %s", task.name, type(error).__name__, error)
        return None


def _name(config: StudyConfig, key: TrialKey) -> str:
    """File name of a trial's checkpoint: studies in one folder never meet."""
    text = json.dumps([config.to_dict(), asdict(key)], sort_keys=True)
    return (
        f"{key.method.replace(':', '-')}-{key.batch_size}-{key.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )
