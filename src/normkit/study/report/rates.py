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


def neighbour_change(grid: Sequence[Rate], lr: float | None, steps: int) -> float | State | None:
    """Change of the mean validation score from a rate to one some points away on the grid.

    Args:
        grid: The rates that were tried, lowest first.
        lr: The rate to start from.
        steps: Points to go, up or (negative) down.

    Returns:
        The change, or what became of the runs there that did not finish; None where there is no such point, or no score at
        ``lr``.

    Examples:
        >>> grid = [Rate(0.01, 0.75), Rate(0.1, 1.0), Rate(1.0, None, ("diverged",))]
        >>> [neighbour_change(grid, 0.1, steps) for steps in (-1, 1, 2)]
        [-0.25, 'diverged', None]
    """
    at = next((k for k, rate in enumerate(grid) if rate.lr == lr), None)
    own = None if at is None else grid[at].score
    if at is None or own is None or not 0 <= at + steps < len(grid):
        return None
    there = grid[at + steps]
    if there.lost:
        return there.lost[0]
    return None if there.score is None else there.score - own


def search_note(record: StudyRecord) -> str:
    """Say how many examples a run of the search saw, where they were fewer than those of a final run; else empty.

    Args:
        record: A study, finished or not.
    """
    share, budget = record.config.get("search_budget", 1.0), record.config["budget"]
    examples = max(round(share * budget) if share <= 1 else int(share), *record.config["batch_sizes"])
    if examples >= budget or all(trial.key.phase != "search" for trial in record.trials):
        return ""
    return f"Search runs saw {examples:,} examples, final runs {budget:,}."
