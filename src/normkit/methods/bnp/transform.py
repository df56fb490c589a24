"""The gradients of many layers transformed with few operations.

Layers of one shape, side by side, are one layer with more groups: their gradients are joined, transformed at once, and
written back. A network has far fewer shapes than layers, and small operations cost their launch, not their arithmetic.
What is one number per unit is computed for all shapes together.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from normkit.methods.bnp.preconditioning import Layout, bounding_factors, into_z_, out_of_z_, unit_changes
from normkit.methods.bnp.statistics import LayerIndex, Preconditioners, compute_dtype

Rate: TypeAlias = Tensor | float

LARGEST_BATCH = 1 << 22
"""Weights that are transformed together at most: larger ones gain nothing and would need memory."""


class LayerStep(NamedTuple):
    """One layer at one step: its place in the index, its gradients, how far the optimizer carries it along lasting ones."""

    place: int
    weight: Tensor
    weight_grad: Tensor
    bias_grad: Tensor | None
    rate: Rate | None


class Transform:
    """Preconditions gradients in place. What goes together is found out once, and kept while the same layers step."""

    def __init__(self) -> None:
        self._key: object = None
        self._batches: list[_Batch] = []

    def __call__(self, steps: Sequence[LayerStep], preconditioners: Preconditioners, max_change: float | None) -> None:
        """Transform the gradients of ``steps``, bounded by ``max_change`` where that is given."""
        kinds = _kinds(steps, preconditioners.layer_index)
        if self._key != (preconditioners.layer_index, kinds):
            self._key = preconditioners.layer_index, kinds
            groups = _together(steps, kinds, preconditioners.layer_index)
            self._batches = [_Batch(same_shape, steps, preconditioners.layer_index) for same_shape in groups]
        for batch in self._batches:
            batch.transform_([steps[i] for i in batch.positions], preconditioners, max_change)


def _kinds(steps: Sequence[LayerStep], index: LayerIndex) -> list[tuple[object, ...]]:
    """Of each step the layer, and what must be the same in layers that are transformed together."""
    numbers: dict[object, int] = {}
    kinds = []
    for place, _, grad, bias_grad, rate in steps:
        no_bias = bias_grad is None
        number = numbers.setdefault(rate if isinstance(rate, float) else id(rate), len(numbers))
        kinds.append((place, grad.dtype, grad.device, no_bias, no_bias and index.layers[place].mean_removed, number))
    return kinds


def _together(
    steps: Sequence[LayerStep], kinds: Sequence[tuple[object, ...]], index: LayerIndex
) -> Iterator[list[list[int]]]:
    """What is transformed together.

    Yields:
        Positions in ``steps``, those of layers of one shape in one list.
    """
    shapes: dict[object, dict[object, list[int]]] = {}
    for i, (step, kind) in enumerate(zip(steps, kinds, strict=True)):
        shape = step.weight_grad.shape, index.layers[step.place].geometry
        shapes.setdefault(kind[1:], {}).setdefault(shape, []).append(i)
    for of_a_kind in shapes.values():
        batch, total = [], 0
        for same_shape in of_a_kind.values():
            size = max(1, steps[same_shape[0]].weight_grad.numel())
            most = max(1, LARGEST_BATCH // size)
            for part in (same_shape[start : start + most] for start in range(0, len(same_shape), most)):
                if batch and total + size * len(part) > LARGEST_BATCH:
                    yield batch
                    batch, total = [], 0
                batch.append(part)
                total += size * len(part)
        yield batch


class _Part:
    """Layers of one shape as one layer with more groups, and where its rows and units lie in the index's vectors."""

    def __init__(self, steps: Sequence[LayerStep], index: LayerIndex) -> None:
        shape, geometry, self.count = steps[0].weight_grad.shape, index.layers[steps[0].place].geometry, len(steps)
        self.layout = Layout((self.count * shape[0], *shape[1:]), self.count * geometry.groups, geometry.transposed)
        self.features = self.layout.along_in(torch.cat([index.indices[step.place] for step in steps])).flatten()
        units = self.layout.groups * self.layout.outs // self.count
        self.owner = torch.cat([torch.full((units,), step.place, device=index.device) for step in steps])

    def rows(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors shaped as the weights of the layers, as rows of the one."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return self.layout.rows(joined if joined.dtype == dtype else joined.to(dtype))


class _Batch:
    """Layers that are transformed together, in parts of one shape.

    Args:
        same_shape: Positions in ``steps``, those of layers of one shape in one list.
        steps: A step of all layers.
        index: The layers.
    """

    def __init__(self, same_shape: Sequence[Sequence[int]], steps: Sequence[LayerStep], index: LayerIndex) -> None:
        self.positions = [i for part in same_shape for i in part]
        first = steps[self.positions[0]]
        self.dtype, self.device = compute_dtype(first.weight_grad), first.weight_grad.device
        self.mean_removed = first.bias_grad is None and index.layers[first.place].mean_removed
        self.parts = [_Part([steps[i] for i in part], index) for part in same_shape]
        self.features = torch.cat([part.features for part in self.parts])
        self.owner = torch.cat([part.owner for part in self.parts])
        self.widths = [len(part.features) for part in self.parts]
        self.units = [len(part.owner) for part in self.parts]

    def transform_(
        self, steps: Sequence[LayerStep], preconditioners: Preconditioners, max_change: float | None
    ) -> None:
        """Precondition the gradients, bound them where ``max_change`` and the rate are given, and write them back."""
        grads, biases = [s.weight_grad for s in steps], [s.bias_grad for s in steps if s.bias_grad is not None]
        bias_rows = torch.cat(biases).to(self.dtype).split(self.units) if biases else [None] * len(self.parts)
        rate = steps[0].rate
        bounded = max_change is not None and rate is not None
        weights = [s.weight for s in steps]
        done, changes, spreads, start = [], [], [], 0
        for part, bias, mean, sigma in zip(self.parts, bias_rows, *self._features(preconditioners), strict=True):
            layout, stop = part.layout, start + part.count
            mean, sigma = (
                None if self.mean_removed else mean.view(layout.groups, 1, -1),
                sigma.view(layout.groups, 1, -1),
            )
            bias = None if bias is None else layout.units(bias)
            z = into_z_(part.rows(grads[start:stop], self.dtype), bias, mean, sigma)
            if bounded:
                change, spread = unit_changes(z, bias, part.rows(weights[start:stop], self.dtype), sigma)
                changes.append(change.reshape(-1))
                spreads.append(spread.reshape(-1))
            done.append(out_of_z_(z, bias, mean, sigma))
            start = stop
        factors = preconditioners.divisor.index_select(0, self.owner).reciprocal_().to(self.device, self.dtype)
        if max_change is not None and rate is not None:
            known = preconditioners.known.index_select(0, self.owner).to(self.device, self.dtype)
            changes = torch.cat(changes) * factors * known * rate
            factors = factors * bounding_factors(changes, torch.cat(spreads), max_change)
        new = []
        for part, (weight, _), factor in zip(self.parts, done, factors.split(self.units), strict=True):
            new += part.layout.weight(weight.mul_(part.layout.units(factor))).chunk(part.count)
        if biases:
            new += torch.cat([bias.view(-1) for _, bias in done]).mul_(factors).split([len(b) for b in biases])
        old = grads + biases
        elsewhere = [i for i, (o, n) in enumerate(zip(old, new, strict=True)) if o.data_ptr() != n.data_ptr()]
        if elsewhere:
            torch._foreach_copy_([old[i] for i in elsewhere], [new[i] for i in elsewhere])

    def _features(self, preconditioners: Preconditioners) -> Iterator[Sequence[Tensor]]:
        """Mean and standard deviation of the inputs of each part, for every column of its rows."""
        table = (
            torch
            .stack((preconditioners.mean, preconditioners.variance.sqrt()))
            .to(self.dtype)
            .index_select(1, self.features)
        )
        return (row.split(self.widths) for row in table.to(self.device).unbind())
