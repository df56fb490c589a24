"""Online input normalization: batch normalization of the raw inputs replaces fixed or offline standardization.

Revisiting Batch Normalization, Jim Davis, Logan Frank, arXiv 2110.13989 (version 1).
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from normkit.inspection.forward import check_batches
from normkit.inspection.graph import dataflow
from normkit.inspection.norms import PRODUCERS, NormTraits
from normkit.methods.method import WideStatistics
from normkit.moments import Moments, merge, observe, statistics_dtype

INPUT_SCALE = 0.58
"""About the standard deviation of ReLU(N(0, 1)), ``sqrt(1/2 - 1/(2 pi)) = 0.5838``: inputs scaled like activations."""


class InputNorm(WideStatistics, NormTraits, nn.Module):
    r"""Normalizes raw inputs per channel (arXiv 2110.13989v1): ``y = weight * (x - mean) / sqrt(var + eps)``, no shift.

    For the first place of a model, on images in [0, 1], sequences or tabular features. In train mode the statistics are
    those of the batch; a batch of one sample is normalized by the running statistics, it included. In eval mode they
    are the running ones, which are the exact mean and variance of all rows seen in train mode: after one pass, those of
    the data set. (All rows weigh equally, so old ones are not forgotten.) Under DistributedDataParallel they are those of
    rank 0, as with batch normalization.

    Args:
        channels: Number of channels or features ``C``.
        scale: Initial value of ``weight``, the trainable scale per channel.
        eps: Added to the variance.
        channel_dim: 1 for ``(N, C)``, ``(N, C, length)`` and images; -1 for tokens ``(N, length, C)``.
        device: Device of parameters and buffers.
        dtype: Dtype of the scale; statistics are kept in fp32 or wider.

    Examples:
        >>> norm = InputNorm(1, scale=1.0, eps=1e-12)
        >>> norm(torch.tensor([[1.0], [3.0]])).squeeze(1).tolist(), norm.eval()(torch.tensor([[4.0]])).item()
        ([-1.0, 1.0], 2.0)
    """

    statistics = "batch"
    hidden = False
    running_mean: Tensor
    running_var: Tensor
    rows_seen: Tensor

    def __init__(
        self,
        channels: int,
        *,
        scale: float = INPUT_SCALE,
        eps: float = 1e-5,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = self.num_features = channels
        self.eps, self.channel_dim = eps, channel_dim
        self.weight = nn.Parameter(torch.full((channels,), scale, device=device, dtype=dtype))
        wide = statistics_dtype(self.weight.dtype)
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=wide))
        self.register_buffer("running_var", torch.ones(channels, device=device, dtype=wide))
        self.register_buffer("rows_seen", torch.zeros((), device=device, dtype=torch.long))

    @property
    def feature_dim(self) -> int:
        """Dimension of the channels."""
        return self.channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, ``(N, C, ...)`` or, with ``channel_dim=-1``, ``(N, ..., C)``.

        Raises:
            ValueError: The input has another number of channels, or is not floating point.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"InputNorm got {x.dtype} inputs; give floating point, for uint8 images for example x.float() / 255"
            )
        if x.ndim < 2 or x.shape[self.channel_dim] != self.channels:
            raise ValueError(
                f"InputNorm has {self.channels} channels in dimension {self.channel_dim}, got shape {tuple(x.shape)}; "
                "build it with that many channels, or with the other channel_dim"
            )
        if self.training:
            self._see(x)
        first = x.movedim(self.channel_dim, 1)
        if self.training and x.shape[0] > 1:
            y = F.batch_norm(first, None, None, self.weight, None, training=True, eps=self.eps)
        else:
            weight = self.weight.to(self.running_mean.dtype)
            y = F.batch_norm(first, self.running_mean, self.running_var, weight, None, eps=self.eps)
        return y.movedim(1, self.channel_dim)

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        """Merge the rows of ``x`` into the running statistics."""
        count = self.rows_seen.to(self.running_mean.dtype)
        seen = merge(Moments(count, self.running_mean, self.running_var * count), observe(x, self.channel_dim))
        self.running_mean.copy_(seen.mean)
        self.running_var.copy_(torch.where(seen.count > 0, seen.variance, self.running_var))
        self.rows_seen.copy_(seen.count.long())

    def extra_repr(self) -> str:
        """Arguments of the layer."""
        return f"{self.channels}, eps={self.eps}, channel_dim={self.channel_dim}"


def with_input_norm(model: nn.Module, batches: Iterable[Any] | None = None) -> nn.Module:
    """Put an [`normkit.InputNorm`][] in front of the model, on its device: a Sequential of ``input_norm`` and ``model``.

    Args:
        model: Any module that takes one floating-point tensor.
        batches: Batches of inputs ``(N, C, ...)``, or tuples that begin with them, of which the first is looked at for the
            number of channels; without them it is that of the first linear or convolutional layer.

    Returns:
        The new model.

    Raises:
        ValueError: There is no batch, and no layer to tell the number of channels from.
    """
    check_batches(batches, "revisited+input")
    first = next(iter(batches), None) if batches is not None else None
    first = first[0] if isinstance(first, (tuple, list)) else first
    channels = first.shape[1] if isinstance(first, Tensor) and first.ndim > 1 else _input_channels(model)
    like = next(model.parameters(), torch.empty(0))
    norm = InputNorm(channels, device=like.device, dtype=like.dtype)
    both = nn.Sequential(OrderedDict(input_norm=norm.train(model.training), model=model))
    both.training = model.training  # not train(): parts of the model may be in eval mode on purpose
    return both


def _input_channels(model: nn.Module) -> int:
    modules = dict(model.named_modules())
    layers = [modules[step.path] for step in dataflow(model).steps if step.name == "module" and step.path in modules]
    layer = next((layer for layer in layers if isinstance(layer, PRODUCERS)), None)
    if layer is None:
        raise ValueError(
            "the model shows no linear or convolutional layer to tell the number of input channels from; give batches, "
            "or put normkit.InputNorm(channels) in front of the model"
        )
    return layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features
