"""One observed layer: its geometry, and the rows of its input since the last optimizer step.

The rows of a convolution are its patches (im2col), and a channel's mean is over all patches and taps. No patch is made: each
position of the input counts as often as taps meet it, a product of one small vector per dimension (:func:`tap_shares`). Zeros
that the layer pads with or inserts add nothing to the sums, only to the count.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from normkit.inspection.compiling import disable_dynamo
from normkit.inspection.counting import Collector, InputCounter, is_counting
from normkit.inspection.markers import attachment
from normkit.methods.kernels.sums import RowSums
from normkit.moments import statistics_dtype

Layer: TypeAlias = nn.Linear | _ConvNd
Statistics: TypeAlias = Literal["patches", "channels"]


_SHAPES = 64  # input shapes of a layer whose weighing is kept


class Sums(NamedTuple):
    """What a forward has to say about a layer's input.

    Attributes:
        rows: Number of rows.
        positions: Number of output positions.
        of_features: Sum and sum of squares of each feature, ``(features, 2)``.
    """

    rows: Tensor | float
    positions: Tensor | float
    of_features: Tensor


class _Weighing(NamedTuple):
    """How the rows of an input are summed.

    Attributes:
        rows: Number of rows.
        positions: Number of output positions.
        sums: Sums the features.
        weights: How often each position counts, None where all count alike.
        scale: How often all count.
    """

    rows: float
    positions: float
    sums: RowSums
    weights: Tensor | None
    scale: float


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


def tap_shares(layer: _ConvNd, size: int, outputs: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Share of the taps along one dimension that meet each position of the input, summed over the output positions.

    A tap k of output position o meets input position ``o stride + k dilation - padding``; in a transposed convolution input
    position i meets output position ``i stride + k dilation - padding``.

    Args:
        layer: A convolution.
        size: Positions of its input along the dimension.
        outputs: Positions of its output along the dimension.
        dim: The dimension, 0 for the first one behind the channels.
        device: Where to compute.

    Returns:
        Shape ``(size,)``: 1 where each tap meets the position once.

    Examples:
        >>> [round(share, 2) for share in tap_shares(nn.Conv1d(1, 1, 3, padding=1), 4, 4, 0).tolist()]
        [0.67, 1.0, 1.0, 0.67]
    """
    kernel, stride, dilation = layer.kernel_size[dim], layer.stride[dim], layer.dilation[dim]
    dtype = wide_dtype(torch.device(device))
    taps = dilation * torch.arange(kernel, device=device)
    if layer.transposed:
        met = torch.arange(size, device=device)[:, None] * stride + taps - int(layer.padding[dim])
        return ((met >= 0) & (met < outputs)).sum(1, dtype=dtype) / kernel
    pads = layer._reversed_padding_repeated_twice  # before and after, the last dimension first; resolves "same" too
    last = 2 * (len(layer.kernel_size) - 1 - dim)
    before, after = pads[last : last + 2]
    first = torch.arange(size + before + after, device=device)[:, None] - taps  # where the patch begins
    met = ((first % stride == 0) & (first >= 0) & (first < outputs * stride)).sum(1, dtype=dtype) / kernel
    if layer.padding_mode == "zeros":
        return met[before : before + size]
    source = torch.arange(size, device=device, dtype=met.dtype)
    source = F.pad(source[None, None], (before, after), layer.padding_mode)[0, 0].long()
    return met.new_zeros(size).index_add_(0, source, met)


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
        statistics: Whether the rows of a convolution are its patches, or the positions of its input.
    """

    def __init__(
        self, path: str, layer: Layer, collector: Collector, mask: Mask, statistics: Statistics = "patches"
    ) -> None:
        super().__init__(collector)
        self.path = path
        self.layer = layer
        self.running: tuple[Tensor, Tensor, Tensor] | None = None
        self.prepared = False
        self.unsupported = False
        self.norm: nn.Module | None = None
        self._mask = mask
        self._statistics = statistics
        self._weighings: dict[object, _Weighing] = {}  # of the input shapes seen lately
        self._accumulator: Tensor | None = None  # what compiled forwards add to: rows, positions, sums, squares
        self._compiled = self._materialized = False
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

    @property
    def has_gradient(self) -> bool:
        """Whether the weight has a gradient at present."""
        return self.weight is not None and self.weight.grad is not None

    @property
    def counted(self) -> bool:
        """Whether rows may have counted since the last step (of compiled forwards the device alone knows)."""
        return self._compiled or bool(self.pending)

    def materialized(self) -> bool:
        """Whether the layer has its shape by now (a lazy layer gets it in its first forward)."""
        if not self._materialized:
            self._materialized = not isinstance(self.weight, UninitializedParameter)
        return self._materialized

    def allocate(self) -> None:
        """Make what compiled forwards add to, where the layer is by now: a graph can only change what exists."""
        device = self.layer.weight.device
        if self.materialized() and (self._accumulator is None or self._accumulator.device != device):
            self._accumulator = _zeros(self.geometry.features, device)

    def fill(self, rows: Sums, weight: Tensor | None) -> None:
        """Count rows of gradients that a backward pass has just accumulated."""
        super().fill(rows, weight)
        self.prepared = False

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
            rows, positions = self._accumulator[:2].clone()
            sums.append(Sums(rows, positions, self._accumulator[2:].view(-1, 2).clone()))
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
        weighing = self._weighing_of(layer, x, output)
        if weighing is None:
            return None
        sums = self._sums(weighing, x)
        if not torch.compiler.is_compiling():
            self.count(output, sums, weight)
            return None
        if self._accumulator is None or self._accumulator.device != x.device:
            self._accumulator = _zeros(len(sums.of_features), x.device)
        self._compiled = True
        # a compiled graph knows no Python in its backward: there the node that lets the gradient pass adds to a tensor
        counts = (torch.as_tensor(count, dtype=torch.float64, device=x.device) for count in (sums.rows, sums.positions))
        packed = torch.cat([torch.stack(list(counts)), sums.of_features.flatten()])
        return _CountOnBackward.apply(output, self._accumulator, packed)

    def _fits(self, x: Tensor) -> bool:
        """Whether ``x`` can be what the weight is multiplied with."""
        features, dim = self.geometry.features, self.geometry.feature_dim
        return x.dim() >= -dim and x.shape[dim] == features

    def _sums(self, weighing: _Weighing, x: Tensor) -> Sums:
        rows, positions, sums, weights, scale = weighing
        if (
            self._mask.value is not None
            and (mask := self._matching_mask(x, dim := self.geometry.feature_dim)) is not None
        ):
            counted = mask.to(wide_dtype(x.device))
            share = counted.mean() if weights is None else (counted * weights).mean() / weights.mean()
            rows, positions = rows * share, positions * share
            x = torch.where(mask.unsqueeze(-1).movedim(-1, dim), x, 0)
        of_features = sums(x)
        return Sums(rows, positions, of_features if scale == 1 else of_features * scale)

    def _weighing_of(self, layer: Layer, x: Tensor, output: Tensor) -> _Weighing | None:
        """How the rows of ``x`` are summed, found once per shape, as a small layer costs its Python; None without rows."""
        if torch.compiler.is_compiling():
            return self._weigh(layer, x, output) if x.numel() and output.numel() else None
        key = layer, x.shape, output.shape, x.dtype, x.requires_grad, x.device, type(x)
        weighing = self._weighings.get(key)
        if weighing is None and x.numel() and output.numel():
            if len(self._weighings) >= _SHAPES:
                self._weighings.clear()
            weighing = self._weighings[key] = self._weigh(layer, x, output)
        return weighing

    def _weigh(self, layer: Layer, x: Tensor, output: Tensor) -> _Weighing:
        dim = self.geometry.feature_dim
        positions = output.numel() / output.shape[dim]
        # data may lie far from zero (pixels, years), where sums of squares lose their digits in fp32
        dtype = statistics_dtype(x.dtype) if x.requires_grad else wide_dtype(x.device)
        if isinstance(layer, nn.Linear) or self._statistics != "patches":
            return _Weighing(x.numel() / x.shape[dim], positions, RowSums(x, dim, dtype), None, 1.0)
        shares = self._tap_shares(layer, x, output, dtype)
        weights, scale = (shares, 1.0) if isinstance(shares, Tensor) else (None, shares)
        return _Weighing(positions, positions, RowSums(x, dim, dtype, weights), weights, scale)

    def _tap_shares(self, layer: _ConvNd, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Share of the taps that meet each position of the input, one number where it is the same for all."""
        spatial = len(layer.kernel_size)
        sizes, outputs = x.shape[-spatial:], output.shape[-spatial:]
        if torch.compiler.is_compiling():
            if sizes == outputs and all(k == 1 for k in layer.kernel_size):
                return 1.0
            return _outer([
                tap_shares(layer, *sides, x.device) for sides in zip(sizes, outputs, range(spatial), strict=True)
            ])
        shares = _outer([tap_shares(layer, *sides) for sides in zip(sizes, outputs, range(spatial), strict=True)])
        first = shares.flatten()[0].item()
        if (shares == first).all():
            return first
        shares = shares.to(dtype)
        return (shares.pin_memory() if x.is_cuda else shares).to(x.device, non_blocking=True)

    def _matching_mask(self, x: Tensor, dim: int) -> Tensor | None:
        mask = self._mask.value
        if mask is None:
            return None
        shape = x.shape[:-1] if dim == -1 else x.shape[:dim] + x.shape[dim + 1 :]
        if mask.shape == shape:
            return mask
        return mask.reshape(-1) if (mask.numel(),) == shape else None


def _outer(vectors: list[Tensor]) -> Tensor:
    """The product of one vector per dimension."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = product.unsqueeze(-1) * vector
    return product


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
