"""The gradients of many layers transformed with few operations.

A gradient becomes that of ``z``, is bounded there, and comes back, in place. Layers of one shape, side by side, are one layer
with more groups: small ones are joined, transformed at once, and written back, as small operations cost their launch, not their
arithmetic. What is one number per unit is computed for all shapes together.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from normkit.methods.bnp import c_kernel
from normkit.methods.bnp.preconditioning import (
    bounding_factors,
    implied_bias_grad,
    into_z_,
    lengths_of_units,
    out_of_z_,
)
from normkit.methods.bnp.statistics import LayerIndex, Preconditioners, compute_dtype
from normkit.methods.kernels.choice import kernels
from normkit.moments import is_channels_last
from normkit.optim import weight_rows
from normkit.optim.weight_rows import Layout, most_joined

Rate: TypeAlias = Tensor | float


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
        self._batches: list[_Batch | _KernelBatch] = []

    def __reduce__(self) -> tuple[type["Transform"], tuple[()]]:
        return Transform, ()  # a copy finds out anew

    def __call__(self, steps: Sequence[LayerStep], preconditioners: Preconditioners, max_change: float | None) -> None:
        """Transform the gradients of ``steps``, bounded by ``max_change`` where that is given."""
        index = preconditioners.layer_index
        kinds = _kinds(steps, index)
        if self._key != (key := (index, kernels(*(step.weight_grad for step in steps[:1])), kinds)):
            self._key = key
            self._batches = list(_batches(steps, kinds, index))
        for batch in self._batches:
            batch.transform_([steps[i] for i in batch.positions], preconditioners, max_change)


def _batches(
    steps: Sequence[LayerStep], kinds: Sequence["_Kind"], index: LayerIndex
) -> Iterator["_Batch | _KernelBatch"]:
    """What is transformed together, by the kernel where it can.

    Yields:
        Every layer's batch.
    """
    by_kernel: dict[torch.dtype, list[int]] = {}
    rest = []
    for i, step in enumerate(steps):
        of_kind = by_kernel.setdefault(step.weight_grad.dtype, []) if _by_kernel(step, index) else rest
        of_kind.append(i)
    for positions in by_kernel.values():
        yield _KernelBatch(positions, steps, index)
    for same_shape in _together(steps, kinds, rest, index):
        yield _Batch(same_shape, steps, index)


def _by_kernel(step: LayerStep, index: LayerIndex) -> bool:
    geometry = index.layers[step.place].geometry
    if geometry.transposed or step.weight.shape[1] * geometry.groups != geometry.features:
        return False  # its rows are not lines of memory, or it was replaced by a weight of another shape
    return c_kernel.transforms(step.weight, step.weight_grad, step.bias_grad)


class _KernelBatch:
    """Layers whose gradients the kernel transforms together, where they lie; arguments as for :class:`_Batch`."""

    def __init__(self, positions: Sequence[int], steps: Sequence[LayerStep], index: LayerIndex) -> None:
        self.positions = positions
        shapes = []
        for place, weight, grad, bias_grad, _ in (steps[i] for i in positions):
            observed = index.layers[place]
            groups = observed.geometry.groups
            sizes = weight.shape[0] // groups, weight.shape[1], weight.shape[2:].numel()
            centred = bias_grad is None and not observed.mean_removed
            shapes.append(c_kernel.LayerShape(place, groups, *sizes, is_channels_last(grad), centred))
        self._layers = c_kernel.Layers(steps[positions[0]].weight_grad.dtype, shapes)

    def transform_(
        self, steps: Sequence[LayerStep], preconditioners: Preconditioners, max_change: float | None
    ) -> None:
        """Precondition the gradients, bound them where ``max_change`` and the rate are given."""
        index, *numbers = preconditioners
        self._layers.transform_(steps, index.first, numbers, max_change)


_Kind: TypeAlias = tuple[int, tuple[object, ...], tuple[object, ...]]
"""A layer's place, and what must be the same in layers that are transformed together, and in those that are joined."""


def _kinds(steps: Sequence[LayerStep], index: LayerIndex) -> list[_Kind]:
    numbers: dict[object, int] = {}
    kinds = []
    for place, weight, grad, bias_grad, rate in steps:
        number = numbers.setdefault(rate if isinstance(rate, float) else id(rate), len(numbers))
        contiguous = grad.is_contiguous() and weight.is_contiguous()
        mean_removed = bias_grad is None and index.layers[place].mean_removed
        bias = None if bias_grad is None else (bias_grad.dtype, bias_grad.is_contiguous())
        joined = bias, mean_removed, grad.shape, contiguous or (grad.stride(), weight.stride())
        kinds.append((place, (grad.dtype, grad.device, number), joined))
    return kinds


def _together(
    steps: Sequence[LayerStep], kinds: Sequence[_Kind], positions: Sequence[int], index: LayerIndex
) -> Iterator[list[list[int]]]:
    """Which of the layers at ``positions`` are transformed together.

    Yields:
        Positions in ``steps``, those of layers that are joined in one list.
    """
    shapes: dict[object, dict[object, list[int]]] = {}
    for i in positions:
        step, (place, together, joined) = steps[i], kinds[i]
        shape = step.weight_grad.shape, index.layers[place].geometry, joined
        shapes.setdefault(together, {}).setdefault(shape, []).append(i)
    for of_a_kind in shapes.values():
        batch, total = [], 0
        for same_shape in of_a_kind.values():
            size, most = steps[same_shape[0]].weight_grad.numel(), most_joined(steps[same_shape[0]].weight_grad)
            for part in (same_shape[start : start + most] for start in range(0, len(same_shape), most)):
                if batch and total + size * len(part) > weight_rows.LARGEST_BATCH:
                    yield batch
                    batch, total = [], 0
                batch.append(part)
                total += size * len(part)
        yield batch


class _Part:
    """Layers of one shape as one layer with more groups, and its part of the batch's vectors.

    Attributes:
        features: Of each column of the rows its place in the index's vectors of features.
        owner: Of each unit the place of its layer.
        has_bias: Whether the layers have a trained bias.
        mean_removed: Whether what follows the layers removes the mean of each unit.
        mean: Mean of the inputs, ``(groups, 1, in)``.
        sigma: Square root of their guarded variance, likewise.
        scale: ``1 / sigma``.
        bias: Gradient of the bias, ``(groups, out, 1)``; without a bias the one that centring implies, or zero.
        factor: What each unit's step is multiplied by, likewise.
        change: ``|z|`` of the gradient, likewise.
        spread: ``|z|`` of the weight, likewise.
    """

    mean: Tensor
    sigma: Tensor
    scale: Tensor
    bias: Tensor
    factor: Tensor
    change: Tensor
    spread: Tensor

    def __init__(self, steps: Sequence[LayerStep], index: LayerIndex) -> None:
        grad, observed, self.count = steps[0].weight_grad, index.layers[steps[0].place], len(steps)
        self.has_bias = steps[0].bias_grad is not None
        self.mean_removed = not self.has_bias and observed.mean_removed
        shape, geometry = (self.count * grad.shape[0], *grad.shape[1:]), observed.geometry
        groups, last = self.count * geometry.groups, is_channels_last(grad)
        self.layout = Layout(shape, groups, geometry.transposed, taps_first=last and not geometry.transposed)
        self.features = self.layout.along_in(torch.cat([index.indices[step.place] for step in steps])).flatten()
        units = self.layout.groups * self.layout.outs // self.count
        self.owner = torch.cat([torch.full((units,), step.place, device=index.device) for step in steps])

    def into_z_(self, weight: Tensor) -> Tensor:
        """The gradient's rows as those of ``z``, in their memory."""
        if not self.has_bias and not self.mean_removed:
            implied_bias_grad(weight, self.mean, self.scale, out=self.bias)
        return into_z_(weight, None if self.mean_removed else self.bias, self.mean, self.scale)

    def out_of_z_(self, z: Tensor) -> Tensor:
        """A step of ``z`` as one of the weight, in its memory, and of the bias where there is one."""
        return out_of_z_(z, self.bias, self.mean, self.scale)[0] if self.has_bias else z.mul_(self.scale)


class _Batch:
    """Layers that are transformed together, in parts of one shape.

    Args:
        same_shape: Positions in ``steps``, those of layers of one shape in one list.
        steps: A step of all layers.
        index: The layers.
    """

    def __init__(self, same_shape: Sequence[Sequence[int]], steps: Sequence[LayerStep], index: LayerIndex) -> None:
        same_shape = sorted(same_shape, key=lambda part: steps[part[0]].bias_grad is None)  # those with a bias first
        self.positions = [i for part in same_shape for i in part]
        first = steps[self.positions[0]]
        self.dtype, device = compute_dtype(first.weight_grad), first.weight_grad.device
        self.parts = [_Part([steps[i] for i in part], index) for part in same_shape]
        self.features = torch.cat([part.features for part in self.parts])
        self.owner = torch.cat([part.owner for part in self.parts])
        self.columns = torch.empty(3, len(self.features), dtype=self.dtype, device=device)
        self.units = torch.zeros(4, len(self.owner), dtype=self.dtype, device=device)
        self.bias, self.factor, self.change, self.spread = self.units
        trained = [len(bias) for i in self.positions if (bias := steps[i].bias_grad) is not None]
        self.trained_bias, self.trained_factor = self.bias[: sum(trained)], self.factor[: sum(trained)]
        self.biases = self.trained_bias.split(trained) if trained else ()
        columns = self.columns.split([len(part.features) for part in self.parts], 1)
        units = self.units.split([len(part.owner) for part in self.parts], 1)
        for part, of_columns, of_units in zip(self.parts, columns, units, strict=True):
            groups = part.layout.groups
            part.mean, part.sigma, part.scale = of_columns.view(3, groups, 1, -1)
            part.bias, part.factor, part.change, part.spread = of_units.view(4, groups, -1, 1)

    def transform_(
        self, steps: Sequence[LayerStep], preconditioners: Preconditioners, max_change: float | None
    ) -> None:
        """Precondition the gradients, bound them where ``max_change`` and the rate are given, and write them back."""
        biases = [step.bias_grad for step in steps if step.bias_grad is not None]
        rate = steps[0].rate
        bounded = max_change is not None and rate is not None
        self._prepare(preconditioners)
        if biases:
            torch.cat(biases, out=self.trained_bias)
        zs, start = [], 0
        for part in self.parts:
            some = steps[start : start + part.count]
            z = part.into_z_(part.layout.joined_rows([s.weight_grad for s in some], self.dtype))
            if bounded:
                weight = part.layout.joined_rows([s.weight for s in some], self.dtype)
                lengths_of_units(z, weight, part.sigma, (part.change, part.spread))
            zs.append((some, z))
            start += part.count
        if max_change is not None and rate is not None:
            known = preconditioners.known.index_select(0, self.owner).to(self.change.device, self.dtype)
            change = torch.hypot(self.change, self.bias)
            self.factor.mul_(bounding_factors(change * self.factor * known * rate, self.spread, max_change))
        old, new = biases, list(self.biases)
        if biases:
            self.trained_bias.mul_(self.trained_factor)
        for part, (some, z) in zip(self.parts, zs, strict=True):
            weight = part.out_of_z_(z.mul_(part.factor))
            if weight.data_ptr() != some[0].weight_grad.data_ptr():
                old += [s.weight_grad for s in some]
                new += part.layout.weight(weight).chunk(part.count)
        if old:
            torch._foreach_copy_(old, new)

    def _prepare(self, preconditioners: Preconditioners) -> None:
        """Fill in mean, sigma and 1 / sigma of every column, and ``1 / q^2`` of every unit."""
        sigma = preconditioners.variance.sqrt()
        table = torch.stack((preconditioners.mean, sigma, sigma.reciprocal())).to(self.dtype)
        self.columns.copy_(table.index_select(1, self.features))
        self.factor.copy_(preconditioners.divisor.index_select(0, self.owner).reciprocal_())
