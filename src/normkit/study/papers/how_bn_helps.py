"""The experiments of "How does batch normalization help optimization?", at full size or scaled down.

Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry, NeurIPS 2018, arXiv 1805.11604.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.study.config import HowBNHelps, LandscapeConfig
from normkit.study.environment import check_device, environment
from normkit.study.errors import StudyError
from normkit.study.landscape.records import NOISE_ALONE, LandscapeRecord, Trace
from normkit.study.landscape.run import Experiment, apply, run_landscape, train_and_measure
from normkit.study.models import build_model
from normkit.study.report.landscape import figures_of

logger = logging.getLogger(__name__)

LP = ("l1", "l2", "linf")
METHODS = ("none", "batch", "noisy-batch", NOISE_ALONE, *LP)
VGG_STEPS, DEEP_LINEAR_STEPS = 15_000, 10_000
MEASUREMENTS = 15  # per run
CLEAR = 1.1  # two figures of one seed differ clearly from this ratio on
DEEP_LINEAR = {"features": 10, "samples": 1000, "lr": 1e-6, "span": (1 / 100, 30.0)}


@dataclass(frozen=True)
class Finding:
    """One finding of the paper, and what became of it.

    Attributes:
        claim: What the paper found.
        verdict: ``reproduced`` or ``not reproduced``.
        evidence: The figures.
    """

    claim: str
    verdict: str
    evidence: str


def reproduce(config: HowBNHelps, *, command: str = "") -> LandscapeRecord:
    """Run the experiment.

    Args:
        config: Which one.
        command: The command line, for the report.

    Returns:
        All that was seen, with the paper's findings judged.

    Raises:
        StudyError: Bad input.
    """
    if not 0 < config.scale <= 1:
        raise StudyError(f"--scale {config.scale}: give a share of the paper's steps in (0, 1]")
    if config.model == "dln" and config.lr != HowBNHelps.lr:
        raise StudyError(
            f"--lr {config.lr:g}: is that of the VGG; the deep linear network trains at {DEEP_LINEAR['lr']:g}"
        )
    check_device(config.device)
    record = (_vgg if config.model == "vgg" else _deep_linear)(config, command)
    paper = VGG_STEPS if config.model == "vgg" else DEEP_LINEAR_STEPS
    steps = record.config["steps"]
    notes = [*record.notes, "One seed; a difference of less than 10 % counts as none."]
    if steps < paper:
        notes.append(f"Scaled down: {steps:,} steps instead of the paper's {paper:,}.")
    if config.model == "vgg" and config.width == "small":
        notes.append("Scaled down: every layer of the VGG has a quarter of its width.")
    return replace(record, notes=tuple(notes), findings=findings(record.traces, deep_linear=config.model == "dln"))


def _vgg(config: HowBNHelps, command: str) -> LandscapeRecord:
    steps = max(MEASUREMENTS, round(config.scale * VGG_STEPS))
    settings = LandscapeConfig(
        data=config.data,
        model="vgg13" if config.width == "full" else "vgg13-small",
        methods=METHODS,
        batch_size=128,
        steps=steps,
        every=max(1, steps // MEASUREMENTS),
        lr=config.lr,
        initialization="glorot",
        seed=config.seed,
        device=config.device,
    )
    return run_landscape(settings, command=command)


def _deep_linear(config: HowBNHelps, command: str) -> LandscapeRecord:
    steps = max(MEASUREMENTS, round(config.scale * DEEP_LINEAR_STEPS))
    task = deep_linear_task(config, steps)
    traces = []
    for method in METHODS:
        logger.info("%s: %d steps", method, steps)
        every = max(1, steps // MEASUREMENTS)
        traces.append(train_and_measure(task, method, every=every, span=DEEP_LINEAR["span"], seed=config.seed))
    settings = {"model": "dln", "seed": config.seed, **DEEP_LINEAR, "steps": steps, "methods": METHODS}
    title = "The deep linear network of 25 layers"
    return LandscapeRecord(title, settings, tuple(traces), command, environment(config.device))


def deep_linear_task(config: HowBNHelps, steps: int) -> Experiment:
    """``min |W_1 .. W_25 x - A x|^2``, summed over 1,000 Gaussian samples, which are the batch."""
    generator = torch.Generator().manual_seed(config.seed)
    features = DEEP_LINEAR["features"]
    inputs = torch.randn(DEEP_LINEAR["samples"], features, generator=generator).to(config.device)
    targets = inputs @ torch.randn(features, features, generator=generator).to(config.device).T

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x) - y).square().sum()

    def build(method: str) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(config.seed)
        model = build_model("dln", input_shape=(features,), classes=features).to(config.device)
        return apply(method, model, lr=DEEP_LINEAR["lr"], momentum=0.0, batches=[inputs])

    def stream() -> Iterable[Any]:
        return ((inputs, targets) for _ in range(steps))

    return Experiment(objective, build, stream)


def findings(traces: Sequence[Trace], *, deep_linear: bool) -> tuple[Finding, ...]:
    """Each finding of the paper against what was measured.

    The thresholds are ours: "like batch normalization" means nearer to it than to none, on a logarithmic scale for beta;
    for all else see ``clearly``.
    """
    seen = {trace.method: trace for trace in traces}
    facts = {trace.method: figures_of(trace) for trace in traces}
    end = {m: float("inf") if t.diverged or not t.losses else t.losses[-1][1] for m, t in seen.items()}
    start = {m: t.losses[0][1] if t.losses else float("inf") for m, t in seen.items()}

    def value(method: str, name: str) -> float:
        found = facts[method][name]
        return float("nan") if found is None else found

    def values(name: str, methods: Sequence[str]) -> str:
        return ", ".join(f"{m} {value(m, name):.3g}" for m in methods)

    pair = ("none", "batch")
    ratio = value("none", "beta") / value("batch", "beta")
    early = value("none", "early_beta") / value("batch", "early_beta")
    near = (end["none"] + end["batch"]) / 2
    between = (value("none", "beta") * value("batch", "beta")) ** 0.5
    judged = [
        (
            "With batch normalization the loss varies less along the gradient",
            clearly(value("none", "band"), value("batch", "band")),
            f"median width of the band: {values('band', pair)}",
        ),
        (
            "With batch normalization the gradient changes less along the gradient",
            clearly(value("none", "change"), value("batch", "change")),
            f"median of the largest change: {values('change', pair)}",
        ),
        (
            "With batch normalization the effective beta-smoothness is better, early most of all",
            clearly(ratio, 1.0) and clearly(early, ratio),
            f"median beta: {values('beta', pair)} (ratio {ratio:.3g}); in the first third {values('early_beta', pair)} "
            f"(ratio {early:.3g})",
        ),
        (
            "Batch normalization often has more internal covariate shift",
            clearly(value("batch", "shift"), value("none", "shift")),
            f"median |G - G'|/|G|: {values('shift', pair)}; median cosine: {values('cosine', pair)}",
        ),
        (
            "Noisy batch normalization trains like batch normalization ...",
            end["noisy-batch"] < near,
            f"training loss at the end: {_losses(end, ('none', 'batch', 'noisy-batch'))}",
        ),
        (
            "... although its activations are less stable than those of the plain net",
            clearly(value("noisy-batch", "drift"), value("none", "drift")),
            f"median change of the means by one step: {values('drift', ('none', 'batch', 'noisy-batch'))}",
        ),
        (
            "The same noise on the plain net stops its training",
            end[NOISE_ALONE] > (start["none"] + end["none"]) / 2,
            f"training loss at the end: {_losses(end, ('none', NOISE_ALONE))}, at the start {start['none']:.3g}",
        ),
        (
            "l_p normalizations smooth like batch normalization ...",
            all(value(m, "beta") < between for m in LP),
            f"median beta: {values('beta', (*pair, *LP))}",
        ),
        (
            "... while their activations shift more",
            all(clearly(value(m, "variance_drift"), value("batch", "variance_drift")) for m in LP),
            f"median change of the variances by one step: {values('variance_drift', ('batch', *LP))}",
        ),
    ]
    if deep_linear:
        best = all(clearly(end[m], end["l1"]) for m in (*pair, *LP) if m != "l1")
        judged.append((
            "On the deep linear network l_1 is best",
            best,
            f"loss at the end: {_losses(end, (*pair, *LP))}",
        ))
    return tuple(Finding(claim, "reproduced" if holds else "not reproduced", text) for claim, holds, text in judged)


def clearly(larger: float, smaller: float) -> bool:
    """Return whether the first figure exceeds the second by more than one seed's noise, as we take it: 10 %."""
    return larger > CLEAR * smaller


def _losses(end: dict[str, float], methods: Sequence[str]) -> str:
    return ", ".join(f"{m} {end[m]:.3g}" for m in methods)
