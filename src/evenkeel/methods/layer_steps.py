"""The gradients of many layers transformed with few operations.

Layers of one shape, side by side, are one layer with more groups: their gradients are concatenated, transformed once, and
written back. A network has far fewer shapes than layers, and small operations cost their launch, not their arithmetic.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from evenkeel.methods.observed import Observed
from evenkeel.methods.preconditioning import bounding_factors, precondition, scale_units, unit_changes
from evenkeel.methods.row_statistics import Metric

Rate: TypeAlias = Tensor | float

LARGEST_BATCH = 1 << 22
"""Weights that are transformed together at most: larger ones gain nothing and would need memory."""


class LayerStep(NamedTuple):
    """One layer at one step: its gradients, its metric, and how far the optimizer carries it along a lasting gradient."""

    seen: Observed
    weight_grad: Tensor
    bias_grad: Tensor | None
    metric: Metric
    rate: Rate | None


def transform_(steps: Iterable[LayerStep], max_change: float | None) -> None:
    """Precondition the gradients of all layers in place, bounded by ``max_change`` where that is given."""
    for batch in _of_one_shape(steps):
        _transform_batch_(batch, max_change)


def _of_one_shape(steps: Iterable[LayerStep]) -> Iterator[list[LayerStep]]:
    """The layers that can be transformed together.

    Yields:
        Lists of steps of one shape, layout, rule and rate.
    """
    batches: dict[object, list[LayerStep]] = {}
    for step in steps:
        grad, seen = step.weight_grad, step.seen
        key = (
            grad.shape,
            grad.dtype,
            grad.device,
            seen.geometry.groups,
            seen.geometry.transposed,
            step.bias_grad is None,
            seen.mean_removed,
            step.rate if isinstance(step.rate, float) else id(step.rate),
        )
        batch = batches.setdefault(key, [])
        if batch and (len(batch) + 1) * grad.numel() > LARGEST_BATCH:
            yield batches.pop(key)
            batch = batches.setdefault(key, [])
        batch.append(step)
    yield from batches.values()


def _transform_batch_(batch: list[LayerStep], max_change: float | None) -> None:
    first, count = batch[0], len(batch)
    groups, transposed = count * first.seen.geometry.groups, first.seen.geometry.transposed
    mean, variance = _joined([s.metric.mean for s in batch]), _joined([s.metric.variance for s in batch])
    weight_grad = _joined([s.weight_grad for s in batch]).to(mean.dtype)
    biases = [s.bias_grad for s in batch if s.bias_grad is not None]
    bias_grad = _joined(biases).to(mean.dtype) if biases else None
    weight, bias = precondition(
        weight_grad,
        bias_grad,
        mean,
        variance,
        groups=groups,
        transposed=transposed,
        mean_removed=first.seen.mean_removed,
    )
    # both gradients are proportional to 1 / q^2: it goes into the factors of the units
    inverse = torch.stack([s.metric.divisor for s in batch]).reciprocal()
    if max_change is None or first.rate is None:
        units = weight.shape[1] * groups if transposed else weight.shape[0]
        factors = inverse.repeat_interleave(units // count)
    else:
        weights = _joined([s.seen.layer.weight.detach() for s in batch]).to(mean.dtype)
        change, spread = unit_changes(
            weights, (weight_grad, bias_grad), (weight, bias), variance, groups=groups, transposed=transposed
        )
        inverse = inverse.repeat_interleave(len(change) // count)
        factors = inverse * bounding_factors(change * (inverse * first.rate).square(), spread, max_change)
    weight = scale_units(weight, factors, groups=groups, transposed=transposed)
    torch._foreach_copy_([s.weight_grad for s in batch], weight.chunk(count))  # pyright: ignore[reportPrivateImportUsage]
    if bias is not None:
        torch._foreach_copy_(biases, (bias * factors).chunk(count))  # pyright: ignore[reportPrivateImportUsage]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
