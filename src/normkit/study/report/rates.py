"""The search of a study: the learning rates that were tried, and the mean validation score at each of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normkit.study.records import State, StudyRecord, TrialResult


@dataclass(frozen=True)
class Rate:
    """One learning rate of a method's grid at one batch size.

    Attributes:
        lr: The learning rate.
        score: Mean validation score of the search runs that finished; None where none did.
        lost: States of the runs that did not finish (``diverged``, ``failed``, ``pruned``), each once.
    """

    lr: float
    score: float | None
    lost: tuple[State, ...] = ()


def grids(record: StudyRecord) -> dict[tuple[str, int], tuple[Rate, ...]]:
    """The rates tried for each method at each batch size, lowest first; empty where the study gives the rates.

    Args:
        record: A study, finished or not.
    """
    runs: dict[tuple[str, int], dict[float, list[TrialResult]]] = {}
    for trial in record.trials:
        if trial.key.phase == "search":
            cell = runs.setdefault((trial.key.method, trial.key.batch_size), {})
            cell.setdefault(trial.key.lr, []).append(trial)
    return {cell: tuple(_rate(lr, by_lr[lr]) for lr in sorted(by_lr)) for cell, by_lr in runs.items()}


def _rate(lr: float, trials: Sequence[TrialResult]) -> Rate:
    scores = [t.validation_score for t in trials if t.state == "finished" and t.validation_score is not None]
    lost = Counter[State](t.state for t in trials if t.state != "finished")
    return Rate(lr, float(np.mean(scores)) if scores else None, tuple(lost))


def is_at_edge(grid: Sequence[Rate], lr: float | None) -> bool:
    """Return whether a rate is the lowest or highest of those tried, so that a better one may lie beyond.

    Args:
        grid: The rates that were tried, lowest first.
        lr: The rate of the final runs; None before there is one.

    Examples:
        >>> grid = [Rate(0.01, 0.8), Rate(0.1, 0.9), Rate(1.0, None, ("diverged",))]
        >>> is_at_edge(grid, 0.1), is_at_edge(grid, 0.01), is_at_edge(grid[:1], 0.01)
        (False, True, False)
    """
    return len(grid) > 1 and lr in {grid[0].lr, grid[-1].lr}
