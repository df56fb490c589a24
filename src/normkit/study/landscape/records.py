"""Measurements of the landscape's runs, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any

from normkit.study.records import ACCURACY, Metric

NOISE_ALONE = "none+noise"  # not a recipe: the noise of noisy-batch on a net without normalization


@dataclass(frozen=True)
class Trace:
    """Measurements of one run.

    Attributes:
        method: The method.
        losses: (step, mean training loss since the previous point).
        records: The Monitor's records of the measured steps, without those of single channels.
        shifts: (step, layer -> relative difference and cosine) of the covariate shift.
        drifts: (step, layer -> changes of mean and variance by this one step, and since the first measurement).
        score: Test score, where there is one.
        diverged: Whether the loss became non-finite; the run ended there.
    """

    method: str
    losses: tuple[tuple[int, float], ...]
    records: tuple[dict[str, Any], ...]
    shifts: tuple[tuple[int, dict[str, tuple[float, float]]], ...]
    drifts: tuple[tuple[int, dict[str, tuple[float, float, float, float]]], ...]
    score: float | None = None
    diverged: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Trace":
        """The trace that was kept as plain data; the score was once called accuracy."""
        return cls(**{"score" if name == "accuracy" else name: value for name, value in data.items()})


@dataclass(frozen=True)
class LandscapeRecord:
    """All runs, with what is needed to get them again.

    Attributes:
        title: What was done, for the head of the report.
        config: The configuration, JSON-ready.
        traces: One per method.
        command: The command that makes it again.
        environment: Versions, device and so on.
        notes: What a reader must know.
        findings: What was expected and what was found, when the paper's protocol was followed.
        metric: What the scores are.
    """

    title: str
    config: dict[str, Any]
    traces: tuple[Trace, ...]
    command: str
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: tuple[Any, ...] = ()
    metric: Metric = ACCURACY

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
