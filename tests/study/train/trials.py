"""Runs of the tests of training."""

import dataclasses

from normkit.study.records import TrialKey, TrialResult


def key(method: str = "batch", *, size: int = 16, lr: float = 0.01, seed: int = 0, phase: str = "final") -> TrialKey:
    return TrialKey(phase, method, size, lr, seed)


def without_time(result: TrialResult) -> TrialResult:
    return dataclasses.replace(result, seconds=0.0)
