"""What the landscape's runs are asked for, and what they showed: plain data."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import normkit
from normkit._errors import nearest
from normkit.study.config import Training
from normkit.study.environment import check_device
from normkit.study.errors import StudyError

NOISE_ALONE = "none+noise"  # not a recipe: the noise of noisy-batch on a net without normalization


@dataclass(frozen=True)
class LandscapeConfig:
    """What is trained and measured.

    Attributes:
        data: Name of a data set.
        model: Name of a model.
        methods: Recipes, or ``none+noise``.
        batch_size: Examples per step.
        steps: Optimizer steps of each run.
        every: Steps from one measurement to the next.
        lr: Learning rate of all methods, the unit of the walk along the gradient.
        momentum: Momentum; plain SGD is the paper's.
        weight_decay: Weight decay.
        initialization: ``model`` (its own) or ``glorot``.
        seed: Seed of weights and data order, the same for all methods.
        span: Smallest and largest step size of the walk, in units of the learning rate.
        limit: At most this many examples of each split.
        device: ``cpu`` or a CUDA device.
    """

    data: str = "digits"
    model: str = "digits-cnn"
    methods: tuple[str, ...] = ("none", "batch", "bnp")
    batch_size: int = 128
    steps: int = 200
    every: int = 20
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    initialization: Literal["model", "glorot"] = "model"
    seed: int = 0
    span: tuple[float, float] = (0.5, 4.0)
    limit: int | None = None
    device: str = "cpu"

    def validate(self) -> None:
        """Check the values.

        Raises:
            StudyError: Names the argument, the value and the remedy.
        """
        for flag, value in (("--batch-size", self.batch_size), ("--steps", self.steps), ("--every", self.every)):
            if value < 1:
                raise StudyError(f"{flag} {value}: give at least 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise StudyError(f"--lr {self.lr}: a learning rate is a positive number")
        Training(momentum=self.momentum, weight_decay=self.weight_decay).validate()
        check_device(self.device)
        known = [*normkit.recipes(), NOISE_ALONE]
        if not self.methods:
            raise StudyError("--methods is empty; give at least one method, see `normkit recipes`")
        for method in self.methods:
            if method not in known:
                raise StudyError(f"--methods: unknown method {method!r}; {nearest(method, known)}")


@dataclass(frozen=True)
class Trace:
    """What one run showed.

    Attributes:
        method: The method.
        losses: (step, mean training loss since the previous point).
        records: The Monitor's records of the measured steps, without those of single channels.
        shifts: (step, layer -> relative difference and cosine) of the covariate shift.
        drifts: (step, layer -> changes of mean and variance by this one step, and since the first measurement).
        accuracy: Test accuracy, where there is one.
        diverged: Whether the loss became non-finite; the run ended there.
    """

    method: str
    losses: tuple[tuple[int, float], ...]
    records: tuple[dict[str, Any], ...]
    shifts: tuple[tuple[int, dict[str, tuple[float, float]]], ...]
    drifts: tuple[tuple[int, dict[str, tuple[float, float, float, float]]], ...]
    accuracy: float | None = None
    diverged: bool = False


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
    """

    title: str
    config: dict[str, Any]
    traces: tuple[Trace, ...]
    command: str
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: tuple[Any, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
