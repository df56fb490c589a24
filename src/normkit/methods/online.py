"""Online Normalization: running statistics in the forward pass, a control process in the backward pass, no batches.

Online Normalization for Training Neural Networks, Vitaliy Chiley, Ilya Sharapov, Atli Kosson and others, NeurIPS 2019,
arXiv 1905.05894. Per channel, for one sample x_t after the other, with mean m_t and variance s_t of its positions:

    y_t = (x_t - mu_{t-1}) / sigma_{t-1}
    mu_t = a mu_{t-1} + (1 - a) m_t
    sigma^2_t = a sigma^2_{t-1} + (1 - a) s_t + a (1 - a) (m_t - mu_{t-1})^2

Backward, for the gradient y'_t, with averages <.> over positions, the gradient is kept orthogonal to y and to 1 over time:

    g_t = y'_t - (1 - b) e^y_{t-1} y_t             e^y_t = e^y_{t-1} + <g_t y_t>
    x'_t = g_t / sigma_{t-1} - (1 - b) e^1_{t-1}   e^1_t = e^1_{t-1} + <x'_t>

Scale and shift follow, then layer scaling: every sample is divided by the root mean square of all its features.

All four recurrences are affine in their state, so that a batch of N samples takes ceil(log2 N) vector operations and gives
exactly what N batches of one give.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.inspection.compiling import disable_dynamo
from normkit.methods.method import FROM_START, Method, Part, Recipe, Successor, WideStatistics, layer_target
from normkit.moments import statistics_dtype


def affine_recurrence(factor: Tensor, increment: Tensor, start: Tensor) -> Tensor:
    """Return all states of ``state_t = factor_t state_{t-1} + increment_t``, by a parallel scan.

    Args:
        factor: ``(N, ...)``.
        increment: ``(N, ...)``.
        start: The state before the first step, ``(...)``.

    Returns:
        ``(N + 1, ...)``: the start, and the state after each step.

    Examples:
        >>> affine_recurrence(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor(1.0))
        tensor([ 1.,  3., 10.])
    """
    factor = torch.cat([torch.zeros_like(start)[None], factor])
    state = torch.cat([start[None], increment])
    reach = 1
    while reach < len(state):
        state = torch.cat([state[:reach], state[reach:] + factor[reach:] * state[:-reach]])
        factor = torch.cat([factor[:reach], factor[reach:] * factor[:-reach]])
        reach *= 2
    return state


def online_statistics(x: Tensor, mean: Tensor, variance: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance before the first sample and after each.

    A sample that is not finite changes nothing.

    Args:
        x: Samples in their order, ``(N, C, ...)``.
        mean: Running mean so far, ``(C,)``.
        variance: Running variance so far, ``(C,)``.
        decay: ``a``.

    Returns:
        Means and variances, ``(N + 1, C)`` each; sample ``t`` is normalized with entry ``t``.
    """
    values = x.detach().flatten(2).to(mean.dtype) if x.ndim > 2 else x.detach().unsqueeze(2).to(mean.dtype)
    own_variance, own = torch.var_mean(values, 2, correction=0)
    finite = own.isfinite() & own_variance.isfinite()
    factor = 1 - (1 - decay) * finite.to(mean.dtype)
    means = affine_recurrence(factor, torch.where(finite, (1 - decay) * own, 0.0), mean)
    between = decay * (own - means[:-1]).square()
    return means, affine_recurrence(factor, torch.where(finite, (1 - decay) * (own_variance + between), 0.0), variance)


def controlled_gradient(
    grad: Tensor, y: Tensor, scale: Tensor, error_y: Tensor, error_1: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the samples from that of their normalized values, by the control process.

    Args:
        grad: Gradient of ``y``, ``(N, C, ...)``.
        y: Normalized samples in their order, ``(N, C, ...)``.
        scale: ``1 / sigma`` with which each was normalized, ``(N, C)``.
        error_y: Accumulated error along ``y``, ``(C,)``.
        error_1: Accumulated error along 1, ``(C,)``.
        decay: ``b``.

    Returns:
        The gradient of the samples, and both errors after the last.
    """
    positions = list(range(2, grad.ndim))

    def average(values: Tensor) -> Tensor:
        return values.mean(positions) if positions else values

    def spread(values: Tensor) -> Tensor:
        return values.reshape(*values.shape, *(1 for _ in positions))

    wide, normal = grad.to(scale.dtype), y.to(scale.dtype)
    errors_y = _accumulate(1 - (1 - decay) * average(normal.square()), average(wide * normal), error_y)
    wide = (wide - (1 - decay) * spread(errors_y[:-1]) * normal) * spread(scale)
    errors_1 = _accumulate(torch.full_like(scale, decay), average(wide), error_1)
    wide = wide - (1 - decay) * spread(errors_1[:-1])
    return wide.to(grad.dtype), errors_y[-1], errors_1[-1]


def _accumulate(factor: Tensor, increment: Tensor, error: Tensor) -> Tensor:
    """The recurrence of an error; a gradient that is not finite, as loss scaling meets at times, changes nothing."""
    finite = factor.isfinite() & increment.isfinite()
    return affine_recurrence(torch.where(finite, factor, 1.0), torch.where(finite, increment, 0.0), error)


class _Normalize(torch.autograd.Function):
    """``(x - center) scale``, with the control process for a backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, center: Tensor, scale: Tensor, error_y: Tensor, error_1: Tensor, decay: float
    ) -> Tensor:
        shape = (*center.shape, *(1 for _ in range(x.ndim - 2)))
        y = ((x.to(center.dtype) - center.view(shape)) * scale.view(shape)).to(x.dtype)
        ctx.save_for_backward(y, scale)
        ctx.errors, ctx.decay = (error_y, error_1), decay
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, scale = ctx.saved_tensors
        error_y, error_1 = ctx.errors
        grad, *now = controlled_gradient(grads[0], y, scale, error_y.clone(), error_1.clone(), ctx.decay)
        with torch.no_grad():
            for error, new in zip((error_y, error_1), now, strict=True):
                error.copy_(new)
        return grad, None, None, None, None, None


def layer_scaling(y: Tensor, eps: float = 1e-5) -> Tensor:
    """Return ``y / sqrt(mean(y^2) + eps)``, the mean over all features and positions of a sample.

    Args:
        y: ``(N, C, ...)``.
        eps: Added to the mean square.

    Returns:
        The scaled samples.

    Examples:
        >>> layer_scaling(torch.tensor([[3.0, 4.0]]), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    wide = y.to(statistics_dtype(y.dtype))
    return (wide * (wide.square().mean(list(range(1, y.ndim)), keepdim=True) + eps).rsqrt()).to(y.dtype)


class OnlineNorm(WideStatistics, Successor, nn.Module):
    """Online Normalization (arXiv 1905.05894); its equations are at the top of ``normkit.methods.online``.

    Evaluation normalizes with the running statistics, followed by scale, shift and layer scaling. A batch of N samples is
    taken as N samples in a row: no sample is normalized with statistics that contain it or a later one.

    Args:
        num_features: Channels ``C``.
        eps: Added to the variance, and to the mean square of layer scaling.
        affine: Learn ``weight`` and ``bias``.
        forward_decay: ``a``, per sample.
        backward_decay: ``b``, per sample.
        device: Device of parameters and buffers.
        dtype: Their dtype; statistics and errors are kept in fp32 or wider.

    Raises:
        ValueError: A decay is not between 0 and 1.
    """

    statistics = "running"
    wide = ("running_mean", "running_var", "error_y", "error_1")
    dimensions = ()
    running_mean: Tensor
    running_var: Tensor
    error_y: Tensor
    error_1: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, decay in (("forward_decay", forward_decay), ("backward_decay", backward_decay)):
            if not 0 <= decay < 1:
                raise ValueError(f"{name} is {decay}; choose it in [0, 1), such as 0.999")
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None
        wide = statistics_dtype(dtype or torch.get_default_dtype())
        for name in ("running_mean", "running_var", "error_y", "error_1"):
            start = torch.ones if name == "running_var" else torch.zeros
            self.register_buffer(name, start(num_features, device=device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, ...)``, in train mode one sample after the other.

        Raises:
            ValueError: The shape is wrong.
        """
        if x.ndim not in self.dimensions:
            expected = " or ".join(f"{d}-d" for d in self.dimensions)
            raise ValueError(f"{type(self).__name__} expects {expected} input, got shape {tuple(x.shape)}")
        if self.training and len(x):
            shape = (-1,) + (1,) * (x.ndim - 2)
            y = self._normalize(x)
            if self.weight is not None:
                y = y * self.weight.view(shape)
            if self.bias is not None:
                y = y + self.bias.view(shape)
            y = y.to(x.dtype)
        else:
            wide = self.running_mean.dtype  # which torch's batch normalization wants of all four
            weight, bias = (None if t is None else t.to(wide) for t in (self.weight, self.bias))
            y = F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        return layer_scaling(y, self.eps)

    @disable_dynamo
    def _normalize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            means, variances = online_statistics(x, self.running_mean, self.running_var, self.forward_decay)
            self.running_mean.copy_(means[-1])
            self.running_var.copy_(variances[-1])
            scale = (variances[:-1] + self.eps).rsqrt()
        y: Tensor = _Normalize.apply(x, means[:-1], scale, self.error_y, self.error_1, self.backward_decay)
        return y

    def extra_repr(self) -> str:
        """The settings."""
        decays = f"forward_decay={self.forward_decay}, backward_decay={self.backward_decay}"
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, {decays}"


class OnlineNorm1d(OnlineNorm):
    """Online Normalization (arXiv 1905.05894) of ``(N, C)`` or ``(N, C, L)``; see ``OnlineNorm``."""

    dimensions = (2, 3)


class OnlineNorm2d(OnlineNorm):
    """Online Normalization (arXiv 1905.05894) of ``(N, C, H, W)``; see ``OnlineNorm``."""

    dimensions = (4,)


class OnlineNorm3d(OnlineNorm):
    """Online Normalization (arXiv 1905.05894) of ``(N, C, D, H, W)``; see ``OnlineNorm``."""

    dimensions = (5,)


METHOD = Method(
    recipes=(
        Recipe(
            "online",
            "Online normalization: running statistics per sample",
            "Chiley et al. 2019, arXiv 1905.05894",
            0.1,
            convert=Part("online", "forward_decay", "backward_decay", "eps"),
            group="Batch normalization and its relatives",
        ),
    ),
    targets={
        "online": layer_target(
            (OnlineNorm1d, OnlineNorm2d, OnlineNorm3d),
            FROM_START + ", and every sample is scaled by its features' root mean square",
            another=True,
        )
    },
)
