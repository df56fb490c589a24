"""Train methods side by side under the Monitor: how smooth is the landscape, how much do the layers' inputs shift.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import normkit
from normkit._errors import nearest
from normkit.inspection.forward import in_order
from normkit.inspection.norms import PRODUCERS, is_norm
from normkit.inspection.probe import Objective, Probe
from normkit.instruments import Monitor, activations, covariate_shift, snapshot
from normkit.methods.noisy_norm import MomentNoise
from normkit.study.check import build, check_task
from normkit.study.config import OF_NAMED_DATA, LandscapeConfig, StudyConfig, Training
from normkit.study.environment import check_device, environment
from normkit.study.errors import StudyError
from normkit.study.landscape.records import NOISE_ALONE, LandscapeRecord, Trace
from normkit.study.load import load_unsplit
from normkit.study.methods import parse_method
from normkit.study.models.layers import glorot_initialize
from normkit.study.records import TrialResult
from normkit.study.task import Task
from normkit.study.train.loop import evaluate

logger = logging.getLogger(__name__)

LOSS_POINTS = 200
KEPT = ("step", "lr", "loss", "gradient_norm", "landscape", "curvature", "removed")  # of the Monitor's records


@dataclass(frozen=True)
class Experiment:
    """What the runs of all methods share.

    Attributes:
        objective: ``loss = objective(model, batch)``.
        build: Method -> model and optimizer.
        batches: The training batches of one run, anew with every call.
        score: Test score of a trained model, or None.
    """

    objective: Objective
    build: Callable[[str], tuple[nn.Module, Optimizer]]
    batches: Callable[[], Iterable[Any]]
    score: Callable[[nn.Module], float | None] = lambda _: None


def experiment(config: LandscapeConfig, task: Task, **options: Any) -> Experiment:
    """The runs of a task; ``options`` go to [`normkit.apply`][]."""
    size = config.batch_size

    def build(method: str) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(config.seed)
        model = task.model().to(config.device)
        if config.initialization == "glorot":
            glorot_initialize(model)
        first = map(task.first_of, islice(stream(), 4))  # lazily: most methods need none
        settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay, **options}
        return apply(method, model, batches=first, **settings)

    def stream() -> Iterable[Any]:
        how = {"batch_size": size, "budget": config.steps * size, "seed": config.seed, "device": config.device}
        return (micro.batch for (micro,) in task.training_batches(**how, augmented=False))

    settings = StudyConfig(batch_sizes=(size,))
    return Experiment(task.loss, build, stream, lambda model: evaluate(model, task, "test", settings)[0])


def apply(method: str, model: nn.Module, **options: Any) -> tuple[nn.Module, Optimizer]:
    """[`normkit.apply`][], and the noise of ``noisy-batch`` alone where the normalization layers were."""
    if method != NOISE_ALONE:
        name, settings = parse_method(method)
        return normkit.apply(name, model, options=settings, **options)
    places = [path for path, module in model.named_modules() if is_norm(module)]
    model, optimizer = normkit.apply("none", model, **options)
    for path in places:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Sequential(model.get_submodule(path), MomentNoise()))
    return model, optimizer


def train_and_measure(
    shared: Experiment,
    method: str,
    *,
    every: int,
    span: tuple[float, float],
    seed: int = 0,
    walk_steps: int = 8,
) -> Trace:
    """Train one method under the instruments.

    Args:
        shared: What to train.
        method: The method.
        every: Steps from one measurement to the next.
        span: Of the walk along the gradient.
        seed: Of noise and dropout.
        walk_steps: Number of step sizes of the walk.

    Returns:
        What was seen.
    """
    plain, _ = shared.build("batch")
    places = _some([path for path, module in plain.named_modules() if is_norm(module)])
    model, optimizer = shared.build(method)
    present = {path for path, _ in model.named_modules()}
    places = [path for path in places if path in present]
    with Probe(model, shared.objective, next(iter(shared.batches()))) as probe:
        later = [owner for owner in in_order(probe) if isinstance(owner.module, PRODUCERS)][1:]
    weighted = _some([owner.path for owner in later if any(p.requires_grad for p in owner.parameters)])
    losses: list[float] = []
    shifts, drifts, first = [], [], None
    diverged = False
    torch.manual_seed(seed)
    model.train()
    with Monitor(model, shared.objective, optimizer, every, steps=walk_steps, span=span) as monitor:
        for step, batch in enumerate(shared.batches()):
            measured = step % every == 0
            seen = activations(model, shared.objective, batch, at=places) if measured else None
            optimizer.zero_grad()
            loss = shared.objective(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                diverged = True
                break
            loss.backward()
            monitor.observe(batch, loss)
            before = snapshot(model) if measured else {}
            optimizer.step()
            if seen is not None:
                shift = covariate_shift(model, shared.objective, batch, before, layers=weighted)
                shifts.append((step, {s.layer: (s.relative, s.cosine) for s in shift.layers}))
                first = first or seen
                now = activations(model, shared.objective, batch, at=places)
                change, total = now.drift(seen), now.drift(first)
                drifts.append((step, {path: (*change[path], *total[path]) for path in change}))
    score = None if diverged else shared.score(model)
    records = tuple({key: r[key] for key in KEPT} for r in monitor.history if "landscape" in r)
    return Trace(method, _thinned(losses), records, tuple(shifts), tuple(drifts), score, diverged)


def _some(paths: Sequence[str]) -> list[str]:
    """A layer near the input, one in the middle and the last one."""
    return [paths[k] for k in sorted({len(paths) // 4, len(paths) // 2, len(paths) - 1})] if paths else []


def _thinned(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    size = max(1, math.ceil(len(losses) / LOSS_POINTS))
    pieces = [losses[start : start + size] for start in range(0, len(losses), size)]
    return tuple((min((k + 1) * size, len(losses)), sum(piece) / len(piece)) for k, piece in enumerate(pieces))


def _check(config: LandscapeConfig) -> None:
    """Check the values.

    Raises:
        StudyError: Names the argument, the value and the remedy.
    """
    for flag, value in (("--batch-size", config.batch_size), ("--steps", config.steps), ("--every", config.every)):
        if value < 1:
            raise StudyError(f"{flag} {value}: give at least 1")
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise StudyError(f"--lr {config.lr}: a learning rate is a positive number")
    if len(config.span) != 2 or not 0 < config.span[0] < config.span[1] < math.inf:
        raise StudyError(
            f"--span {','.join(map(str, config.span))}: give two numbers, the smallest and the largest step"
        )
    Training(momentum=config.momentum, weight_decay=config.weight_decay).validate()
    check_device(config.device)
    known = [*normkit.recipes(), NOISE_ALONE]
    if not config.methods:
        raise StudyError("--methods is empty; give at least one method, see `normkit recipes`")
    for method in config.methods:
        if parse_method(method)[0] not in known:
            raise StudyError(f"--methods: unknown method {method!r}; {nearest(method, known)}")
        if config.methods.count(method) > 1:
            raise StudyError(f"--methods: {method} given twice; name each once")


def run_landscape(config: LandscapeConfig, *, command: str = "") -> LandscapeRecord:
    """Train every method and measure.

    Args:
        config: What to do.
        command: The command line, for the report.

    Returns:
        All that was seen.

    Raises:
        StudyError: Bad input.
    """
    _check(config)
    task = load_unsplit(config)
    check_task(task, build(task, config.device), config.device)
    shared = experiment(config, task)
    traces, failed = [], []
    for method in config.methods:
        logger.info("%s: %d steps of %d samples", method, config.steps, config.batch_size)
        try:
            traces.append(train_and_measure(shared, method, every=config.every, span=config.span, seed=config.seed))
        except Exception as error:  # the others' runs are not lost for it
            failed.append(f"No landscape of {method}: {type(error).__name__}: {error}".splitlines()[0])
            logger.warning(failed[-1])
    if not traces:
        raise StudyError(f"--methods: none could run; {failed[0]}")
    title = f"{task.model_summary} on {Path(task.name).name}: the landscape of {', '.join(config.methods)}"
    notes = (*filter(None, [task.note]), *failed)
    options = {name: value for name, value in asdict(config).items() if not config.task or name not in OF_NAMED_DATA}
    return LandscapeRecord(
        title, options, tuple(traces), command, environment(config.device), notes, metric=task.measure
    )


STUDY_STEPS, STUDY_MEASUREMENTS = 200, 10


def study_traces(config: StudyConfig, task: Task, results: Iterable[TrialResult]) -> list[Trace]:
    """One run per method of a study, at its largest batch size and with the learning rate of its final runs there.

    Args:
        config: The study.
        task: Its task.
        results: Its trials.

    Returns:
        One trace for every method that has had final runs and can run.
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
            shared = experiment(settings, task, optimizer=config.optimizer)
            every = max(1, steps // STUDY_MEASUREMENTS)
            try:
                traces.append(train_and_measure(shared, method, every=every, span=settings.span))
            except Exception as error:  # as in its trials, whose results must not be lost for it
                logger.warning(f"no landscape of {method}: {type(error).__name__}: {error}".splitlines()[0])
    return traces
