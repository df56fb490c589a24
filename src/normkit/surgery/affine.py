"""Normalization layers as affine maps, and their products with linear and convolutional layers."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from normkit.inspection.norms import Producer, is_placeholder, normalizes_own_input, outputs


@dataclass(frozen=True)
class Affine:
    """``y = scale x + shift`` per channel, in float64.

    Attributes:
        scale: ``(C,)``.
        shift: ``(C,)``.
        channel_dim: Dimension of the channels, 1 or -1.
        zero: What is mapped to 0, ``(C,)``, where zeros that follow may be replaced by it; else None.
    """

    scale: Tensor
    shift: Tensor
    channel_dim: int
    zero: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The map, applied to ``x``."""
        last = x.movedim(self.channel_dim, -1)
        return (last * self.scale + self.shift).movedim(-1, self.channel_dim)


def affine_of(norm: nn.Module) -> Affine | str:
    """Return the affine map that ``norm`` computes in eval mode, or why it is none.

    It is read off the layer's tensors and confirmed by a probe, since a subclass may compute something else.
    """
    if any(is_lazy(tensor) for tensor in (*norm.parameters(), *norm.buffers())):
        return "it has not seen its first batch"
    if normalizes_own_input(norm):
        return "it normalises by the statistics of its own input"
    layer: Any = copy.deepcopy(norm).double().eval()
    affine = _read(layer)
    if isinstance(affine, Affine) and not _confirmed(layer, affine):
        return "its eval output is not that of a batch normalization"
    return affine


@torch.no_grad()
def _read(layer: Any) -> Affine | str:
    channel_dim: int = getattr(layer, "feature_dim", 1)
    if is_placeholder(layer) and layer.bias is not None:
        return Affine(torch.ones_like(layer.bias), layer.bias, channel_dim)
    weight, bias, mean, var = (getattr(layer, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
    if mean is None or var is None:
        return "it keeps no running statistics"
    scale = (var + getattr(layer, "eps", 1e-5)).rsqrt() * (1 if weight is None else weight)
    # without a shift the mean is mapped to 0, and if the scale is 0 nothing that follows can see the difference
    return Affine(scale, (0 if bias is None else bias) - mean * scale, channel_dim, mean if bias is None else None)


@torch.no_grad()
def _confirmed(layer: nn.Module, affine: Affine) -> bool:
    features = affine.scale.numel()
    values = torch.linspace(-2, 2, 12 * features, dtype=torch.float64, device=affine.scale.device)
    for space in ((), (6,), (3, 2), (3, 2, 1)):
        rows = values[: 2 * features * torch.Size(space).numel()]
        x = rows.reshape(2, features, *space).movedim(1, affine.channel_dim)
        try:
            y = layer(x)
        except Exception:  # each kind of layer refuses the other shapes in its own way
            continue
        if y.shape == x.shape:  # otherwise it broadcast an input of too few dimensions
            return torch.allclose(y, affine(x), rtol=1e-6, atol=1e-6)
    return False


@torch.no_grad()
def fold_behind(layer: Producer, affine: Affine) -> nn.Module | str:
    """Change ``layer`` to compute ``affine(layer(x))``.

    Returns:
        What stands for the map, or why it cannot be; then the layer is unchanged.
    """
    conv = isinstance(layer, _ConvNd)
    if affine.scale.numel() != outputs(layer):
        return "the layer before it has another number of channels"
    if conv and affine.channel_dim != 1:
        return "it normalises another dimension than the channels of the layer before it"
    weight = layer.weight.double()
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        grouped = weight.unflatten(0, (layer.groups, -1))
        scaled = grouped * affine.scale.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = scaled.flatten(0, 1)
    else:
        weight = weight * affine.scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = affine.shift if layer.bias is None else layer.bias.double() * affine.scale + affine.shift
    _set(layer, weight, bias)
    return nn.Identity()


@torch.no_grad()
def fold_before(layer: Producer, affine: Affine) -> nn.Module | str:
    """Change ``layer`` to compute ``layer(affine(x))``.

    Zero padding puts zeros behind the map: where ``affine.zero`` says what becomes zero, padding with that before the
    map is the same, and the layer pads no more.

    Returns:
        What stands for the map (an identity or ``PadChannels``), or why it cannot be; then the layer is unchanged.
    """
    if isinstance(layer, _ConvTransposeNd):
        return "a transposed convolution behind it takes the shift for fewer inputs at the border"
    conv = isinstance(layer, _ConvNd)
    if affine.scale.numel() != (layer.in_channels if conv else layer.in_features):
        return "the layer behind it has another number of channels"
    if conv and affine.channel_dim != 1:
        return "it normalises another dimension than the channels of the layer behind it"
    padded = conv and _pads_zeros(layer) and bool(affine.shift.any())
    if padded and affine.zero is None:
        return "the convolution behind it pads with zeros, which are not normalised"
    weight = layer.weight.double()
    out, space = weight.shape[0], [1] * (weight.dim() - 2)
    groups = layer.groups if conv else 1
    scale, shift = (
        t.reshape(groups, 1, -1).expand(groups, out // groups, -1).reshape(out, -1, *space)
        for t in (affine.scale, affine.shift)
    )
    offset = (weight * shift).flatten(1).sum(1)
    _set(layer, weight * scale, offset if layer.bias is None else layer.bias.double() + offset)
    if not padded or affine.zero is None or not isinstance(layer, _ConvNd):
        return nn.Identity()
    return _take_padding(layer, affine.zero)


class PadChannels(nn.Module):
    """Pads maps with one value per channel.

    Args:
        values: Value of each channel, ``(C,)``.
        padding: As in ``torch.nn.functional.pad``: before and after, last dimension first.
    """

    values: Tensor

    def __init__(self, values: Tensor, padding: list[int]) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``(N, C, ...)``."""
        border = F.pad(torch.zeros_like(x[:1, :1]), self.padding, value=1.0)
        return F.pad(x, self.padding) + border * self.values.reshape(-1, *([1] * (x.ndim - 2)))

    def extra_repr(self) -> str:
        """Arguments of the layer."""
        return f"{len(self.values)}, padding={self.padding}"


def _take_padding(layer: _ConvNd, values: Tensor) -> PadChannels:
    padding = list(layer._reversed_padding_repeated_twice)
    layer.padding = (0,) * len(layer.kernel_size)
    layer._reversed_padding_repeated_twice = [0] * len(padding)
    return PadChannels(values.to(layer.weight.dtype), padding)


def _pads_zeros(layer: _ConvNd) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _set(layer: Producer, weight: Tensor, bias: Tensor) -> None:
    """New parameters, for the old ones may be tied to another layer's."""
    old = layer.weight
    layer.weight = nn.Parameter(weight.to(old.dtype), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)
