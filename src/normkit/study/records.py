"""The records of a study: one per trial, and the cost per method and batch size.

Plain data that goes to the store and to ``results.json`` and comes back equal; statistics and report read nothing else.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["search", "final"]
State = Literal["finished", "diverged", "failed", "pruned"]


@dataclass(frozen=True, order=True)
class TrialKey:
    """Identifies one training run of a plan; equal keys are the same run. ``lr`` is 0 where no learning rate worked."""

    phase: Phase
    method: str
    batch_size: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Metric:
    """The name, the unit and the direction of a score.

    Attributes:
        name: Its name.
        unit: Its unit; with ``%`` the score is a fraction that is shown in percent.
        higher_is_better: Whether a higher score is a better one.
    """

    name: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True

    @property
    def column(self) -> str:
        """The score's name in columns and keys: ``test_accuracy`` of classification, ``test_score`` of any other task."""
        return "accuracy" if self.name == "accuracy" else "score"

    def signed(self, score: float) -> float:
        """The score with a sign by which higher is better.

        Args:
            score: The score.

        Examples:
            >>> Metric().signed(0.9), Metric("RMSE", "mm", higher_is_better=False).signed(0.9)
            (0.9, -0.9)
        """
        return score if self.higher_is_better else -score


ACCURACY = Metric()


@dataclass(frozen=True)
class CurvePoint:
    """One point of a training curve.

    Attributes:
        examples: Training examples seen so far.
        train_loss: Mean training loss since the previous point.
        validation_score: Score on the validation split, or None where not evaluated.
    """

    examples: int
    train_loss: float
    validation_score: float | None = None


@dataclass(frozen=True)
class TrialResult:
    """The outcome of one training run.

    Attributes:
        key: Which run.
        state: ``finished``; ``diverged`` (the loss became non-finite: drawn, not hidden); ``failed`` (see ``error``);
            ``pruned`` (given up early, only in a search).
        error: One line that says what went wrong, for ``failed`` and ``diverged``.
        validation_score: Score at the end of training; None for diverged runs, for which no number is made up.
        validation_loss: Mean loss, where the task's score comes with one.
        test_score: Likewise; only final runs touch the test split (once), else None.
        test_loss: Likewise.
        train_eval_gap: Mean loss on training batches in eval mode minus in train mode: what is lost when batch statistics
            are replaced by running ones; None where the model has no loss in eval mode.
        best_step: Optimizer step after which the judged weights were taken; None where they are the last.
        seconds: Wall time of the run; it varies, and is not part of the equality of results.
        validation_seconds: Of them, spent on validating during the run; likewise.
        curve: Training curve.
    """

    key: TrialKey
    state: State
    error: str | None = None
    validation_score: float | None = None
    validation_loss: float | None = None
    test_score: float | None = None
    test_loss: float | None = None
    train_eval_gap: float | None = None
    best_step: int | None = None
    seconds: float = field(default=0.0, compare=False)
    validation_seconds: float = field(default=0.0, compare=False)
    curve: tuple[CurvePoint, ...] = ()

    def to_dict(self, column: str = "score") -> dict[str, Any]:
        """Return plain, JSON-ready data.

        Args:
            column: What scores are called in the keys, see ``Metric.column``.
        """
        data = asdict(self)
        return _score_named(column, {**data, "curve": [_score_named(column, point) for point in data["curve"]]})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TrialResult":
        """Inverse of ``to_dict``."""
        curve = tuple(CurvePoint(**_score_named("score", point)) for point in data["curve"])
        return cls(**{**_score_named("score", data), "key": TrialKey(**data["key"]), "curve": curve})


def _score_named(column: str, data: dict[str, Any]) -> dict[str, Any]:
    """The same data with ``validation_score`` and ``test_score`` called after ``column``."""
    names = {f"{split}_{old}": f"{split}_{column}" for split in ("validation", "test") for old in ("score", "accuracy")}
    return {names.get(key, key): value for key, value in data.items()}


@dataclass(frozen=True)
class Cost:
    """Cost of a method at one batch size, relative to the reference method, measured interleaved in one run.

    Attributes:
        method: Method name.
        batch_size: Batch size.
        step_seconds: Median seconds per training step.
        step_ratio: Median over rounds of this method's step time divided by the reference's in the same round.
        step_ratio_low: 25 % quantile of those ratios.
        step_ratio_high: 75 % quantile.
        memory_bytes: Peak bytes on a GPU, bytes saved for backward on a CPU.
        memory_ratio: ``memory_bytes`` divided by the reference's.
        error: Why it could not be measured, or None.
    """

    method: str
    batch_size: int
    step_seconds: float | None = None
    step_ratio: float | None = None
    step_ratio_low: float | None = None
    step_ratio_high: float | None = None
    memory_bytes: int | None = None
    memory_ratio: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class StudyRecord:
    """All data of a report.

    Attributes:
        config: The configuration of the study, JSON-ready; has at least ``data``, ``model``, ``methods`` (list), ``batch_sizes``
            (list), ``seeds`` (number of final seeds), ``budget`` (training samples per run), ``reference`` (the method that the
            others are paired with: ``batch`` if in the plan, else the first), ``chance`` and ``chance_loss`` (score and loss of
            guessing, or None) and ``alternative`` (``two-sided`` | ``greater``); may have ``metric`` (a ``Metric`` as a
            dictionary), ``data_summary`` (one line that says what the data is), ``primary`` (list of the methods whose
            comparisons were named beforehand), ``margin`` (of equivalence, in points where the unit is ``%``) and ``grown``
            (methods, batch sizes and seeds that the study had before each extension, a list of dictionaries).
        environment: Package versions, device, host processor, git commit if any; name -> text.
        command: The exact command that reproduces the study, credentials redacted.
        trials: All trials that ended.
        costs: Cost per method and batch size.
        planned: Number of trials in the plan (a report can be made from an unfinished study).
        recipes: method name -> {"summary", "paper"}.
        landscape: What each method's run under the instruments showed (``Trace`` as plain data), if it was asked for.
    """

    config: dict[str, Any]
    environment: dict[str, str]
    command: str
    trials: tuple[TrialResult, ...]
    costs: tuple[Cost, ...] = ()
    planned: int = 0
    recipes: dict[str, dict[str, str]] = field(default_factory=dict)
    landscape: tuple[dict[str, Any], ...] = ()

    @property
    def metric(self) -> Metric:
        """What methods are compared by; accuracy in a record that does not say."""
        return Metric(**self.config.get("metric", {}))

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-ready data."""
        return {**asdict(self), "trials": [trial.to_dict(self.metric.column) for trial in self.trials]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "StudyRecord":
        """Inverse of ``to_dict``."""
        return cls(**{
            **data,
            "trials": tuple(TrialResult.from_dict(trial) for trial in data["trials"]),
            "costs": tuple(Cost(**cost) for cost in data["costs"]),
            "landscape": tuple(data.get("landscape", ())),
        })
