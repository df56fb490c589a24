"""One observed layer: its geometry, and the rows of its input since the last optimizer step.

Row counts carry the geometry. Zeros that a convolution pads with, or that a transposed convolution inserts between its
inputs, are rows of its design matrix too: they add nothing to the sums, only to the count.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from normkit.inspection.counting import Collector, InputCounter, disable_dynamo, is_counting
from normkit.inspection.markers import attachment
from normkit.methods.kernels.sums import sum_and_square_sum

Layer: TypeAlias = nn.Linear | _ConvNd


class Sums(NamedTuple):
    """What a forward has to say about a layer's input: rows, output positions, sum and sum of squares per feature."""

    rows: Tensor | float
    positions: Tensor | float
    total: Tensor
    square: Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over a whole step and of running statistics: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Geometry:
    """What the formulas need to know of a layer's shape.

    Attributes:
        features: Input features or channels.
        fan_in: Inputs of one output unit.
        groups: Groups of the convolution, 1 for a linear layer.
        transposed: Whether it is a transposed convolution.
        feature_dim: Dimension of the input, and of the output, that holds the features.
    """

    features: int
    fan_in: int
    groups: int
    transposed: bool
    feature_dim: int


def geometry(layer: Layer) -> Geometry:
    """The geometry of a materialized layer."""
    if isinstance(layer, nn.Linear):
        return Geometry(layer.in_features, layer.in_features, 1, False, -1)
    taps = prod(layer.kernel_size)
    return Geometry(
        layer.in_channels,
        layer.in_channels // layer.groups * taps,
        layer.groups,
        isinstance(layer, _ConvTransposeNd),
        -len(layer.kernel_size) - 1,
    )


def row_count(layer: Layer, shape: torch.Size) -> float:
    """Rows that an input of this shape stands for, the zeros of padding and of a transposed stride included."""
    if isinstance(layer, nn.Linear):
        return prod(shape[:-1])
    count = prod(shape) // layer.in_channels
    if layer.transposed:
        return count * prod(layer.stride)
    if layer.padding_mode == "zeros":
        pads = layer._reversed_padding_repeated_twice  # before and after, the last dimension first; resolves "same" too
        for d in range(len(layer.kernel_size)):
            size = shape[-1 - d]
            count = count // size * (size + pads[2 * d] + pads[2 * d + 1])
    return count


class Mask:
    """Which rows count at present: all (None), or those where ``value`` is True."""

    value: Tensor | None = None


class Observed(InputCounter[Sums]):
    """One layer, and the rows of its input that its forward hook counts.

    Attributes:
        path: Path of the layer in the model.
        layer: The layer; others with the same weight and bias, which ``watch`` adds, are one layer with it.
        running: Running mean, variance and number of steps (fp64 where the device has it), or None before the first step.
        prepared: Whether the present gradients are preconditioned already.
        unsupported: Whether the input or the output of a forward was no rows of the layer; the layer is then left alone.
        norm: The batch or instance normalization that alone takes the layer's output, or None.

    Args:
        path: Path of the layer in the model.
        layer: The layer.
        collector: Who takes the rows.
        mask: Which rows count.
    """

    def __init__(self, path: str, layer: Layer, collector: Collector, mask: Mask) -> None:
        super().__init__(collector)
        self.path = path
        self.layer = layer
        self.running: tuple[Tensor, Tensor, Tensor] | None = None
        self.prepared = False
        self.unsupported = False
        self.norm: nn.Module | None = None
        self._mask = mask
        self._accumulator: Tensor | None = None  # what compiled forwards add to: rows, positions, sums, squares
        self._compiled = False
        self.allocate()
        self.watch(layer)

    @property
    def weight(self) -> Tensor | None:
        """The layer's weight, None if by now it is computed from other parameters; attributes of modules are found slowly."""
        return self.layer._parameters.get("weight")

    @property
    def mean_removed(self) -> bool:
        """Whether the mean of each unit is removed behind the layer (not by a batch normalization in eval mode)."""
        return self.norm is not None and (self.norm.training or getattr(self.norm, "running_mean", None) is None)

    @cached_property
    def geometry(self) -> Geometry:
        """The geometry of the layer, which must have its shape by now."""
        return geometry(self.layer)

    def materialized(self) -> bool:
        """Whether the layer has its shape by now (a lazy layer gets it in its first forward)."""
        return not isinstance(self.weight, UninitializedParameter)

    def allocate(self) -> None:
        """Make what compiled forwards add to, where the layer is by now: a graph can only change what exists."""
        device = self.layer.weight.device
        if self.materialized() and (self._accumulator is None or self._accumulator.device != device):
            self._accumulator = _zeros(self.geometry.features, device)

    def discard(self) -> None:
        """Forget the rows whose gradients were dropped."""
        super().discard()
        self.prepared = False
        if self._compiled and self._accumulator is not None:
            self._accumulator.zero_()

    def take(self) -> list[Sums]:
        """Return the sums of every forward that counted since the last call."""
        sums = super().take()
        if self._compiled and self._accumulator is not None:
            total, square = self._accumulator[2:].clone().chunk(2)
            rows, positions = self._accumulator[:2].clone()
            sums.append(Sums(rows, positions, total, square))
            self._accumulator.zero_()
        return sums

    @attachment
    def _after_forward(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Count the rows of one forward."""
        x = args[0] if args else kwargs.get("input")
        weight = layer._parameters.get("weight")
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and self._fits(x)):
            self.unsupported = True  # a subclass with a forward of its own
            return None
        if weight is None or not (layer.training and output.requires_grad and weight.requires_grad and is_counting()):
            return None
        if not x.numel():
            return None
        sums = self._sums(layer, x, output)
        if not torch.compiler.is_compiling():
            self.count(output, sums, weight)
            return None
        if self._accumulator is None or self._accumulator.device != x.device:
            self._accumulator = _zeros(sums.total.numel(), x.device)
        self._compiled = True
        # a compiled graph knows no Python in its backward: there the node that lets the gradient pass adds to a tensor
        counts = (torch.as_tensor(count, dtype=torch.float64, device=x.device) for count in (sums.rows, sums.positions))
        packed = torch.cat([torch.stack(list(counts)), sums.total, sums.square])
        return _CountOnBackward.apply(output, self._accumulator, packed)

    def _fits(self, x: Tensor) -> bool:
        """Whether ``x`` can be what the weight is multiplied with."""
        features, dim = self.geometry.features, self.geometry.feature_dim
        return x.dim() >= -dim and x.shape[dim] == features

    def _sums(self, layer: Layer, x: Tensor, output: Tensor) -> Sums:
        dim = self.geometry.feature_dim
        rows, positions = row_count(layer, x.shape), output.numel() / output.shape[dim]
        mask = self._matching_mask(x, dim)
        if mask is not None:
            share = mask.mean(dtype=wide_dtype(x.device))
            x = torch.where(mask.unsqueeze(-1).movedim(-1, dim), x, 0)
            return Sums(rows * share, positions * share, *sum_and_square_sum(x, dim))
        # data may lie far from zero (pixels, years), where sums of squares lose their digits in fp32
        return Sums(rows, positions, *sum_and_square_sum(x, dim, None if x.requires_grad else wide_dtype(x.device)))

    def _matching_mask(self, x: Tensor, dim: int) -> Tensor | None:
        mask = self._mask.value
        if mask is None:
            return None
        shape = x.shape[:-1] if dim == -1 else x.shape[:dim] + x.shape[dim + 1 :]
        if mask.shape == shape:
            return mask
        return mask.reshape(-1) if (mask.numel(),) == shape else None


def _make_zeros(features: int, device: torch.device) -> Tensor:
    return torch.zeros(2 + 2 * features, dtype=wide_dtype(device), device=device)


_zeros = disable_dynamo(_make_zeros)


class _CountOnBackward(torch.autograd.Function):
    """The identity, whose backward adds sums to an accumulator (a copy, so that in-place operations may follow)."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, accumulator: Tensor, sums: Tensor) -> Tensor:
        ctx.accumulator = accumulator
        ctx.save_for_backward(sums)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.accumulator.add_(ctx.saved_tensors[0])
        return grads[0], None, None
