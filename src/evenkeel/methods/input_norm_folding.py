"""Fold an input normalization into the first linear or convolution layer, for deployment.

Revisiting Batch Normalization, Jim Davis, Logan Frank, arXiv 2110.13989 (version 1), has the layer; folding is exact
because in eval mode it is an affine map per channel.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from evenkeel.methods.input_norm import InputNorm


class PadChannels(nn.Module):
    """Pads maps with one value per channel: where zero padding followed a normalization that is folded away.

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


@torch.no_grad()
def fold_input_norm(norm: InputNorm, layer: nn.Linear | _ConvNd) -> tuple[nn.Module, nn.Linear | _ConvNd]:
    """Fold the eval-mode map ``gain * x + offset`` of a normalization into the layer that takes its output.

    ``W'[o, c] = W[o, c] gain[c]`` and ``b'[o] = b[o] + sum W[o, c] offset[c]`` over inputs and taps, exact up to
    rounding. Zero padding puts zeros AFTER the normalization, the value ``mean`` before it: where the layer pads with
    zeros, the normalization becomes padding with the mean (:class:`PadChannels`) and the layer pads no more, which is
    exact at the border too. Other padding modes repeat values of the map and stay as they are.

    Args:
        norm: A normalization on dimension 1 (or, before a linear layer, the last).
        layer: The only layer that takes its output; a convolution may be grouped.

    Returns:
        What stands in for the normalization (an identity, or padding) and a copy of the layer for the folded one.

    Raises:
        ValueError: The layer is a transposed convolution, or takes another dimension as its channels.
    """
    if isinstance(layer, _ConvTransposeNd):
        raise ValueError(
            "an InputNorm cannot be folded into a transposed convolution: the zeros that its stride inserts are not "
            "normalized"
        )
    if (norm.channel_dim == -1) != isinstance(layer, nn.Linear) and norm.channel_dim != 1:
        raise ValueError("an InputNorm on the last dimension can be folded into a linear layer only")
    folded = copy.deepcopy(layer)
    gain, offset = (t.to(layer.weight.dtype) for t in norm.affine())
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    shape = (groups, 1, layer.weight.shape[1], *[1] * (layer.weight.ndim - 2))
    weight = layer.weight.unflatten(0, (groups, -1))
    shift = (weight * offset.reshape(shape)).flatten(2).sum(2).flatten()
    folded.weight.copy_((weight * gain.reshape(shape)).flatten(0, 1))
    bias = shift if layer.bias is None else layer.bias + shift
    folded.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    padding = [] if isinstance(layer, nn.Linear) else layer._reversed_padding_repeated_twice
    if isinstance(folded, nn.Linear) or folded.padding_mode != "zeros" or not any(padding):
        return nn.Identity(), folded
    folded.padding = (0,) * len(folded.kernel_size)
    folded._reversed_padding_repeated_twice = [0] * len(padding)
    return PadChannels(norm.running_mean.to(layer.weight.dtype), list(padding)), folded
