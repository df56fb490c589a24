"""The checks of the doctor: each a pure function from the examination to a finding, or None."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from normkit.instruments._doctor.examination import Examination, NormFacts, effective_rows

FEW_ROWS = 8  # below, the batch variance is off by half of itself: relative standard error sqrt(2 / (m - 1))
FAR = 0.25  # nats, mean over channels: means off by 0.7 standard deviations, or variances by a factor of 2.6
DISAGREE = 0.1  # nats between the predictions of the two modes
LOCAL = 0.25  # relative difference of a layer's own output between the modes
MANY = 0.25  # share of a layer's channels


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        disease: Its name.
        severity: ``sick``, or ``advice`` for what costs something but spoils nothing.
        layers: Path of each layer that has it -> the evidence.
        remedy: What to do.
    """

    disease: str
    severity: Literal["sick", "advice"]
    layers: dict[str, str]
    remedy: str

    def __str__(self) -> str:
        shown = [f"  {path or '(model)'}: {evidence}" for path, evidence in list(self.layers.items())[:5]]
        more = [f"  ... and {len(self.layers) - 5} more layers"] if len(self.layers) > 5 else []
        return "\n".join([f"{self.severity}: {self.disease}", *shown, *more, f"  remedy: {self.remedy}"])


def _sick(name: str, layers: dict[str, str], remedy: str) -> Finding | None:
    return Finding(name, "sick", layers, remedy) if layers else None


def _advice(name: str, layers: dict[str, str], remedy: str) -> Finding | None:
    return Finding(name, "advice", layers, remedy) if layers else None


def _with_batch(seen: Examination) -> dict[str, NormFacts]:
    return {path: facts for path, facts in seen.norms.items() if facts.uses_batch}


def poisoned(seen: Examination) -> Finding | None:
    """Running statistics that are not finite."""
    layers = {p: f"{' and '.join(f.poisoned)} not finite" for p, f in seen.norms.items() if f.poisoned}
    return _sick(
        "running statistics poisoned by non-finite values",
        layers,
        "one overflowed batch is enough; reset them (layer.reset_running_stats()), normkit.recalibrate(model, batches) on "
        "clean batches, and skip steps whose loss is not finite",
    )


def one_value(seen: Examination) -> Finding | None:
    """One value per channel in train mode."""
    layers = {
        path: f"{facts.kind} saw one value per channel in train mode (input {'x'.join(map(str, facts.shape))})"
        for path, facts in _with_batch(seen).items()
        if facts.rows == 1
    }
    return _sick(
        "one value per channel",
        layers,
        "minus its own mean it is 0: use more than one example per batch (drop the last short one), or a method that does "
        'not need a batch: normkit.apply("bnp", ...), normkit.convert(model, "group")',
    )


def small_batch(seen: Examination) -> Finding | None:
    """Too few values for the statistics."""
    layers = {}
    for path, facts in _with_batch(seen).items():
        independent = effective_rows(facts.batches)
        if facts.rows is None or facts.rows <= 1:
            continue
        if facts.rows < FEW_ROWS:
            error = math.sqrt(2 / (facts.rows - 1))
            layers[path] = f"{facts.rows} values per channel, so the variance is off by about {error:.0%}"
        elif independent is not None and independent < FEW_ROWS:
            wander = math.sqrt(1 / independent)
            layers[path] = (
                f"{facts.rows} values per channel are worth {independent:.1f} independent ones: from batch to batch the "
                f"mean wanders by {wander:.2f} standard deviations"
            )
    return _sick(
        "batch too small for its statistics",
        layers,
        'use a larger batch, or a method that does not need one: normkit.apply("group+ws", ...), "group+bnp", "bnp"',
    )


def far_running(seen: Examination) -> Finding | None:
    """Running statistics that are not those of the batches."""
    layers = {}
    for path, facts in _with_batch(seen).items():
        if not (facts.trained and facts.running and facts.batches) or facts.poisoned or facts.rows == 1:
            continue
        mean = sum(b.mean for b in facts.batches) / len(facts.batches)
        variance = sum(b.variance for b in facts.batches) / len(facts.batches)
        shift = (mean - facts.running.mean) / facts.running.variance.sqrt()
        ratio = variance / facts.running.variance
        divergence = ((ratio + shift.square() - 1 - ratio.log()) / 2).mean().item()
        if divergence > FAR:
            layers[path] = (
                f"{divergence:.2g} nats away: mean off by {shift.abs().mean().item():.2g} standard deviations, variance "
                f"by a factor of {ratio.log().mean().exp().item():.2g}"
            )
    return _sick(
        "running statistics far from the batches'",
        layers,
        "normkit.recalibrate(model, batches) on training batches; if it comes back, check that train and eval data are "
        "prepared alike, that the momentum is not too small, and that the weights were not changed after training",
    )


def never_updated(seen: Examination) -> Finding | None:
    """Running statistics still at their initial values."""
    layers = {
        path: "eval mode uses mean 0 and variance 1, the initial values"
        for path, facts in _with_batch(seen).items()
        if not facts.trained and facts.running is not None
    }
    return _advice(
        "running statistics never updated",
        layers,
        "expected before training; after loading a checkpoint it means that its buffers were not loaded",
    )


def disagreement(seen: Examination) -> Finding | None:
    """Train and eval mode that compute different functions, and the first layer that causes it."""
    if not seen.discrepancies or any(f.poisoned or (f.uses_batch and not f.trained) for f in seen.norms.values()):
        return None  # without running statistics of its own eval mode means nothing yet
    count = len(seen.discrepancies)
    train, evaluation = (
        sum(getattr(d, key) for d in seen.discrepancies) / count for key in ("train_loss", "eval_loss")
    )
    known = [d.divergence for d in seen.discrepancies if d.divergence is not None]
    if known:
        sick = sum(known) / count > DISAGREE
        flips = sum(d.flips or 0.0 for d in seen.discrepancies) / count
        size = f"{flips:.0%} of the predictions change, "
    else:
        sick, size = abs(evaluation - train) > 0.25 * abs(train), ""
    if not sick:
        return None
    local = {
        layer.layer: sum(d.layers[i].local for d in seen.discrepancies) / count
        for i, layer in enumerate(seen.discrepancies[0].layers)
    }
    losses = f"{size}loss {train:.3g} in train and {evaluation:.3g} in eval mode"
    cause = next((path for path, value in local.items() if value > LOCAL), None)
    if cause is None:
        return _sick(
            "train and eval mode disagree",
            {"": f"{losses}, and no layer's own output by more than {LOCAL:.0%}"},
            "look for what else depends on the mode: dropping of paths or of units written by hand, branches on self.training",
        )
    evidence = f"{losses}; this is the first layer that differs by itself (its output by {local[cause]:.0%})"
    per_sample = cause in seen.norms and not seen.norms[cause].uses_batch
    return _sick(
        "train and eval mode disagree",
        {cause: evidence},
        "it normalizes each sample by itself in train mode alone; build it with track_running_stats=False, or "
        'normkit.convert(model, "instance")'
        if per_sample
        else "normkit.recalibrate(model, batches); if the batch is small, use a method whose two "
        'modes agree: normkit.apply("bnp", ...), normkit.convert(model, "batchless")',
    )


def dead_channels(seen: Examination) -> Finding | None:
    """Channels that are zero behind their ReLU for every batch."""
    return _sick(
        "dead channels",
        _many(seen, "dead", "are 0 behind the ReLU for every example"),
        "lower the learning rate or warm it up, and check the biases; they cost time and learn nothing",
    )


def eps_dominated(seen: Examination) -> Finding | None:
    """Channels that are divided by eps rather than by their own deviation."""
    return _sick(
        "eps-dominated channels",
        _many(seen, "eps_dominated", "vary less than eps and come out near zero"),
        "check the scale of what comes before (weight decay, initialisation, constant inputs); a smaller eps only hides it",
    )


def _many(seen: Examination, kind: str, what: str) -> dict[str, str]:
    always: dict[str, set[int]] = {}
    width: dict[str, int] = {}
    for batch in seen.channels:
        for layer in batch:
            channels = set(getattr(layer, kind))
            always[layer.layer] = always.get(layer.layer, channels) & channels
            width[layer.layer] = len(layer.positive)
    return {p: f"{len(c)} of {width[p]} channels {what}" for p, c in always.items() if len(c) >= MANY * width[p] > 0}


def undone_bias(seen: Examination) -> Finding | None:
    """A bias right before a batch normalization."""
    layers = {layer: f"its bias is taken away by {norm}" for norm, layer in seen.biased.items()}
    return _advice("bias before batch normalization", layers, "build the layer with bias=False; the norm has its own")


def undone_affine(seen: Examination) -> Finding | None:
    """A normalization right before a batch normalization."""
    layers = {norm: f"it undoes the scale and shift of {before}" for norm, before in seen.repeated.items()}
    return _advice("normalization after an affine map that it undoes", layers, "remove one of the two layers")


def norm_decay(seen: Examination) -> Finding | None:
    """Weight decay on scales and shifts."""
    layers = {path: f"weight decay {decay:g} on its scale and shift" for path, decay in seen.decayed.items()}
    return _advice(
        "weight decay on normalization parameters",
        layers,
        "build the optimizer from normkit.param_groups(model, lr=..., weight_decay=...), which decays weights only",
    )


def recomputed(seen: Examination) -> Finding | None:
    """Running statistics that are updated again in the backward pass."""
    layers = {
        path: f"updated {facts.updates_in_backward} more time(s) in the backward pass"
        for path, facts in seen.norms.items()
        if facts.updates_in_backward > 0
    }
    return _sick(
        "statistics updated twice by recomputation",
        layers,
        "activation checkpointing runs the forward pass again: leave normalization out of the checkpointed part, or take "
        "the square root of 1 - momentum (1 - sqrt(0.9) = 0.051 for 0.1), which makes two updates one",
    )


def accumulation(seen: Examination) -> Finding | None:
    """Gradient accumulation, which statistics of a micro-batch ignore."""
    if seen.accumulate == 1:
        return None
    layers = {
        path: f"{facts.rows} values per channel of one micro-batch, though a step has {seen.accumulate} of them"
        for path, facts in _with_batch(seen).items()
    }
    return _advice(
        "accumulation that batch normalization ignores",
        layers,
        'statistics are those of the micro-batch; methods that accumulate exactly: normkit.apply("bnp", ...), "batchless"',
    )


def unsynchronised(seen: Examination) -> Finding | None:
    """Ranks that do not share their statistics."""
    if seen.ranks == 1:
        return None
    layers = {
        path: f"{facts.rows} values per channel on each of {seen.ranks} ranks, not shared"
        for path, facts in _with_batch(seen).items()
        if not facts.synchronised
    }
    few = any((facts.rows or 0) < 4 * FEW_ROWS for path, facts in seen.norms.items() if path in layers)
    make = _sick if few else _advice
    return make(
        "batch normalization not synchronised under DistributedDataParallel",
        layers,
        "nn.SyncBatchNorm.convert_sync_batchnorm(model) before wrapping it, or a method that reduces once per step: "
        'normkit.apply("bnp", ...), "batchless"',
    )


DISEASES: tuple[Callable[[Examination], Finding | None], ...] = (
    poisoned,
    one_value,
    small_batch,
    far_running,
    disagreement,
    dead_channels,
    eps_dominated,
    recomputed,
    unsynchronised,
    accumulation,
    never_updated,
    norm_decay,
    undone_bias,
    undone_affine,
)
