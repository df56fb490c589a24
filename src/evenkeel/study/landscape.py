"""Train methods side by side under the Monitor: how smooth is the landscape, how much do the layers' inputs shift.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import evenkeel
from evenkeel.graph import is_norm
from evenkeel.guard import Objective
from evenkeel.instruments import Monitor, activations, covariate_shift, snapshot
from evenkeel.instruments.layers import WEIGHTED
from evenkeel.methods.noisy_norm import MomentNoise
from evenkeel.study.batches import batches
from evenkeel.study.data import Data, load_data
from evenkeel.study.environment import environment
from evenkeel.study.errors import StudyError, nearest
from evenkeel.study.loop import evaluate
from evenkeel.study.models import build_model
from evenkeel.study.models.layers import glorot_initialize
from evenkeel.study.plan import StudyConfig
from evenkeel.study.records import TrialResult

NOISE_ALONE = "none+noise"  # not a recipe: the noise of noisy-batch on a net without normalization
LOSS_POINTS = 200
KEPT = ("step", "lr", "loss", "gradient_norm", "landscape", "curvature", "removed")  # of the Monitor's records


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
        known = [*evenkeel.recipes(), NOISE_ALONE]
        if not self.methods:
            raise StudyError("--methods is empty; give at least one method, see `evenkeel recipes`")
        for method in self.methods:
            if method not in known:
                raise StudyError(f"--methods: unknown method {method!r}; {nearest(method, known)}")


@dataclass(frozen=True)
class Task:
    """What is trained, apart from the method.

    Attributes:
        objective: ``loss = objective(model, batch)``.
        build: Method -> model and optimizer.
        batches: The training batches of one run, anew with every call.
        judge: Test accuracy of a trained model, or None.
    """

    objective: Objective
    build: Callable[[str], tuple[nn.Module, Optimizer]]
    batches: Callable[[], Iterable[Any]]
    judge: Callable[[nn.Module], float | None] = lambda _: None


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


def classification(config: LandscapeConfig, data: Data, **options: Any) -> Task:
    """The task of a classification data set; ``options`` go to :func:`evenkeel.apply`."""

    def build(method: str) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(config.seed)
        model = build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device)
        if config.initialization == "glorot":
            glorot_initialize(model)
        first = [inputs for inputs, _ in islice(stream(), 4)]
        settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay, **options}
        return apply(method, model, batches=first, **settings)

    def stream() -> Iterable[Any]:
        budget = config.steps * config.batch_size
        return batches(
            data, data.train, batch_size=config.batch_size, budget=budget, seed=config.seed, device=config.device
        )

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        return cross_entropy(model(inputs), labels)

    return Task(objective, build, stream, lambda model: evaluate(model, data, data.test)[0])


def apply(method: str, model: nn.Module, **options: Any) -> tuple[nn.Module, Optimizer]:
    """:func:`evenkeel.apply`, and the noise of ``noisy-batch`` alone where the normalization layers were."""
    if method != NOISE_ALONE:
        return evenkeel.apply(method, model, **options)
    places = [path for path, module in model.named_modules() if is_norm(module)]
    model, optimizer = evenkeel.apply("none", model, **options)
    for path in places:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(path), MomentNoise()))
    return model, optimizer


def watch(
    task: Task,
    method: str,
    *,
    every: int,
    span: tuple[float, float],
    seed: int = 0,
    walk_steps: int = 8,
) -> Trace:
    """Train one method under the instruments.

    Args:
        task: What to train.
        method: The method.
        every: Steps from one measurement to the next.
        span: Of the walk along the gradient.
        seed: Of noise and dropout.
        walk_steps: Number of step sizes of the walk.

    Returns:
        What was seen.
    """
    plain, _ = task.build("batch")
    places = _some([path for path, module in plain.named_modules() if is_norm(module)])
    weighted = _some([path for path, module in plain.named_modules() if isinstance(module, WEIGHTED)][1:])
    model, optimizer = task.build(method)
    present = {path for path, _ in model.named_modules()}
    places, weighted = ([path for path in paths if path in present] for paths in (places, weighted))
    losses: list[float] = []
    shifts, drifts, first = [], [], None
    diverged = False
    torch.manual_seed(seed)
    model.train()
    with Monitor(model, task.objective, optimizer, every, steps=walk_steps, span=span) as monitor:
        for step, batch in enumerate(task.batches()):
            measured = step % every == 0
            seen = activations(model, task.objective, batch, at=places) if measured else None
            optimizer.zero_grad()
            loss = task.objective(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                diverged = True
                break
            loss.backward()
            monitor.observe(batch, loss)
            before = snapshot(model) if measured else {}
            optimizer.step()
            if seen is not None:
                shift = covariate_shift(model, task.objective, batch, before, layers=weighted)
                shifts.append((step, {s.layer: (s.relative, s.cosine) for s in shift.layers}))
                first = first or seen
                now = activations(model, task.objective, batch, at=places)
                change, total = now.drift(seen), now.drift(first)
                drifts.append((step, {path: (*change[path], *total[path]) for path in change}))
    accuracy = None if diverged else task.judge(model)
    records = tuple({key: r[key] for key in KEPT} for r in monitor.history if "landscape" in r)
    return Trace(method, _thinned(losses), records, tuple(shifts), tuple(drifts), accuracy, diverged)


def _some(paths: Sequence[str]) -> list[str]:
    """A layer near the input, one in the middle and the last one."""
    return [paths[k] for k in sorted({len(paths) // 4, len(paths) // 2, len(paths) - 1})] if paths else []


def _thinned(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    size = max(1, math.ceil(len(losses) / LOSS_POINTS))
    pieces = [losses[start : start + size] for start in range(0, len(losses), size)]
    return tuple((min((k + 1) * size, len(losses)), sum(piece) / len(piece)) for k, piece in enumerate(pieces))


def run_landscape(
    config: LandscapeConfig, *, command: str = "", show: Callable[[str], None] = lambda _: None
) -> LandscapeRecord:
    """Train every method and measure.

    Args:
        config: What to do.
        command: The command line, for the report.
        show: Told of progress, a line per method.

    Returns:
        All that was seen.

    Raises:
        StudyError: Bad input.
    """
    config.validate()
    try:
        data = load_data(config.data, limit=config.limit)
        task = classification(config, data)
        task.build(config.methods[0])
    except ValueError as error:
        raise StudyError(f"--data, --model: {error}") from error
    traces = []
    for method in config.methods:
        show(f"{method}: {config.steps} steps of {config.batch_size} examples")
        traces.append(watch(task, method, every=config.every, span=config.span, seed=config.seed))
    title = f"{config.model} on {Path(config.data).name}: the landscape of {', '.join(config.methods)}"
    notes = (data.note,) if data.note else ()
    return LandscapeRecord(title, asdict(config), tuple(traces), command, environment(config.device), notes)


STUDY_STEPS, STUDY_MEASUREMENTS = 200, 10


def study_traces(config: StudyConfig, data: Data, results: Iterable[TrialResult]) -> list[Trace]:
    """One run per method of a study, at its largest batch size and with the learning rate of its final runs there.

    Args:
        config: The study.
        data: Its data.
        results: Its trials.

    Returns:
        One trace for every method that has had final runs.
    """
    size = max(config.batch_sizes)
    rates = {r.key.method: r.key.lr for r in results if r.key.phase == "final" and r.key.batch_size == size}
    steps = min(STUDY_STEPS, max(1, config.budget // size))
    traces = []
    for method in config.methods:
        if method in rates:
            settings = LandscapeConfig(
                model=config.model,
                batch_size=size,
                steps=steps,
                lr=rates[method],
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                device=config.device,
            )
            task = classification(settings, data, optimizer=config.optimizer)
            every = max(1, steps // STUDY_MEASUREMENTS)
            traces.append(watch(task, method, every=every, span=settings.span))
    return traces
