"""Collect the facts for the doctor in one pass over some batches."""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from normkit.inspection.forward import watched, without_dropout
from normkit.inspection.graph import dataflow, producers, rectified
from normkit.inspection.norms import (
    Statistics,
    batch_statistics,
    feature_dim,
    has_initial_statistics,
    is_norm,
    running_statistics,
    statistics_of,
    uses_batch_statistics,
)
from normkit.inspection.probe import Objective, Probe, undisturbed
from normkit.inspection.record import tensor_in
from normkit.instruments._channels import LayerChannels, watch_channels
from normkit.instruments._discrepancy import Discrepancy, discrepancy

_logger = logging.getLogger("normkit")

MOST_BATCHES = 8


@dataclass
class NormFacts:
    """The facts about one normalization layer.

    Attributes:
        kind: Name of its type.
        uses_batch: Whether it normalizes with the batch's statistics in train mode.
        trained: Whether its running statistics are no longer the initial ones, mean 0 and variance 1.
        poisoned: Names of its buffers that hold non-finite values.
        rows: Smallest number of values per channel in a batch.
        shape: Shape of its input then.
        batches: Statistics of each batch.
        running: Its running statistics.
        updates_in_backward: How often the backward pass updated its running statistics.
        synchronised: Whether ranks share their statistics.
    """

    kind: str
    uses_batch: bool = False
    trained: bool = True
    poisoned: tuple[str, ...] = ()
    rows: int | None = None
    shape: tuple[int, ...] = ()
    batches: list[Statistics] = field(default_factory=list)
    running: Statistics | None = None
    updates_in_backward: int = 0
    synchronised: bool = False


@dataclass
class Examination:
    """All facts about a model.

    Attributes:
        norms: Path -> facts of every normalization layer, in the order of the model.
        channels: Every layer's channels on each batch.
        discrepancies: Train against eval, dropout aside, on each batch; empty where one of the modes refused the batches.
        biased: Normalization -> layer before it, whose bias it undoes.
        repeated: Normalization -> normalization before it, whose affine map it undoes.
        decayed: Paths of normalization layers whose parameters an optimizer decays, with the decay.
        ranks: Number of data-parallel ranks.
        accumulate: Micro-batches per optimizer step.
    """

    norms: dict[str, NormFacts]
    channels: list[list[LayerChannels]] = field(default_factory=list)
    discrepancies: list[Discrepancy] = field(default_factory=list)
    biased: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)
    decayed: dict[str, float] = field(default_factory=dict)
    ranks: int = 1
    accumulate: int = 1


def examine(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Any],
    *,
    optimizer: Optimizer | None,
    accumulate: int,
) -> Examination:
    """Examine the model on at most ``MOST_BATCHES`` batches, and leave it as it was.

    Raises:
        ValueError: There is no batch.
    """
    samples = list(islice(undisturbed(model, batches), MOST_BATCHES))
    if not samples:
        raise ValueError("batches: there is none; the doctor needs at least one, better four or more")
    with Probe(model, objective, samples[0]) as probe:
        inner = probe.model
        norms = {name: _at_rest(m) for name, m in inner.named_modules() if is_norm(m)}
        found = Examination(norms, accumulate=accumulate)
        before_relu = rectified(inner)
        found.biased, found.repeated = _undone(inner)
        found.decayed = _decayed(inner, optimizer)
    if isinstance(model, DistributedDataParallel):
        found.ranks = dist.get_world_size(model.process_group)
    compares = True
    for number, batch in enumerate(samples):
        with Probe(model, objective, batch) as probe:
            if not probe.model.training:
                probe.model.train()  # layers that are kept in eval mode within a training model stay there
            seen: list[LayerChannels] = []
            try:
                with without_dropout(probe.model):
                    _one_batch(probe, found, before_relu, seen, first=number == 0)
            except ValueError:
                if not any(facts.rows == 1 and facts.uses_batch for facts in norms.values()):
                    raise
                continue  # torch refuses one value per channel; that is a finding, not a failure
            found.channels.append(seen)
        if not compares:
            continue
        try:
            found.discrepancies.append(discrepancy(model, objective, batch, dropout=False))
        except Exception as error:  # detectors, say, return no losses in eval mode
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            _logger.warning(
                "doctor: train and eval mode are not compared, since the objective in eval mode raised %s", text
            )
            compares = False
    return found


def _at_rest(module: nn.Module) -> NormFacts:
    return NormFacts(
        type(module).__name__,
        trained=not (statistics_of(module) == "batch" and has_initial_statistics(module)),
        poisoned=tuple(
            name
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point() and not torch.isfinite(buffer).all()
        ),
        running=running_statistics(module),
        synchronised=isinstance(module, SyncBatchNorm),
    )


def _one_batch(
    probe: Probe, found: Examination, before_relu: frozenset[str], seen: list[LayerChannels], *, first: bool
) -> None:
    layers = [(name, m) for name, m in probe.model.named_modules() if name in found.norms]

    def enter(name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        x, facts = tensor_in(inputs), found.norms[name]
        facts.uses_batch = uses_batch_statistics(module)
        if x is not None and facts.uses_batch:
            rows = x.numel() // x.shape[feature_dim(module)]
            if facts.rows is None or rows < facts.rows:
                facts.rows, facts.shape = rows, tuple(x.shape)
            if len(facts.batches) < MOST_BATCHES and facts.running is not None:
                facts.batches.append(batch_statistics(module, x)[0])

    with ExitStack() as watching:
        watching.enter_context(watched(layers, before=enter))
        watching.enter_context(watch_channels(probe, before_relu, seen))
        if not first:
            probe.loss()
            return
        loss = probe.loss()
        after_forward = {name: _count(m) for name, m in layers}
        if loss.requires_grad and probe.parameters:
            probe.backward(loss, probe.parameters)
        for name, module in layers:
            found.norms[name].updates_in_backward = _count(module) - after_forward[name]


def _count(module: nn.Module) -> int:
    counter = getattr(module, "num_batches_tracked", None)
    return 0 if counter is None else int(counter)


def _undone(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Biases and affine maps that the batch normalization behind them takes away again."""
    modules = dict(model.named_modules())
    takes_away = {
        path: statistics_of(module) == "batch" and (module.training or not model.training)
        for path, module in modules.items()
        if isinstance(module, _BatchNorm)
    }  # constant statistics take nothing away
    biased = {
        norm: layer
        for norm, layer in producers(model).items()
        if takes_away.get(norm) and modules[layer]._parameters.get("bias") is not None
    }
    flow, repeated = dataflow(model), {}
    for step in flow.steps:
        if step.name != "module" or not takes_away.get(step.path or "") or len(step.inputs) != 1:
            continue
        source = flow.steps[step.inputs[0]]
        before = modules.get(source.path or "") if source.name == "module" else None
        alone = len(flow.consumers(step.inputs[0])) == 1
        if before is not None and alone and is_norm(before) and getattr(before, "weight", None) is not None:
            repeated[step.path or ""] = source.path or ""
    return biased, repeated


def _decayed(model: nn.Module, optimizer: Optimizer | None) -> dict[str, float]:
    if optimizer is None:
        return {}
    decay = {p: g["weight_decay"] for g in optimizer.param_groups if g.get("weight_decay") for p in g["params"]}
    return {
        name: float(decay[parameter])
        for name, module in model.named_modules()
        if is_norm(module)
        for parameter in module.parameters(recurse=False)
        if parameter in decay
    }


def effective_rows(batches: list[Statistics]) -> float | None:
    """Return the independent values per channel, estimated by ``var / var(batch means)``; the median over channels.

    Neighbouring pixels are alike, so it is often far less than the number of values. Needs four batches.

    Args:
        batches: Statistics of each batch.

    Returns:
        The number, or None with too few batches.
    """
    if len(batches) < 4:
        return None
    means = torch.stack([b.mean for b in batches]).double()
    within: Tensor = torch.stack([b.variance for b in batches]).double().mean(0)
    wander = means.var(0)
    return (within / wander.clamp(min=1e-30)).median().item()
