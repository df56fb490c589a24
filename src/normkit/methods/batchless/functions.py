"""The pure functions of batchless normalization: the gradient of the likelihood, and the affine map.

Berger, Uc Cetina. "Batchless Normalization", arXiv 2212.14729.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.methods.kernels import c_kernel
from normkit.methods.kernels.choice import kernels
from normkit.moments import Moments, constant_count, observe_unchecked

Gradient = Literal["natural", "plain"]


def gaussian_nll_gradients(
    moments: Moments,
    mean: Tensor,
    sigma: Tensor,
    *,
    gradient: Gradient = "natural",
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``E[log sigma + n^2 / 2]``, ``n = (x - mu) / sigma``, with respect to mu and rho = log sigma.

    With ``m1 = E n`` and ``m2 = E n^2`` over the rows:

    - plain: ``d mu = -m1 / sigma``, ``d rho = 1 - m2``
    - natural (plain divided by the Fisher information ``diag(1 / sigma^2, 2)``): ``d mu = -sigma m1``,
      ``d rho = (1 - m2) / 2``; a small step of rate eta moves mu like a running mean of weight eta and sigma^2 by the
      factor ``1 + eta (m2 - 1)``.

    Args:
        moments: Moments of the rows of x, ``(features,)`` each.
        mean: mu, shape ``(features,)``.
        sigma: Standard deviation, shape ``(features,)``.
        gradient: ``natural`` or ``plain``.
        eps: Added to the variance of x, so that the fit of a constant feature ends at sqrt(eps).

    Returns:
        ``(d mu, d rho)``, shape ``(features,)`` each.

    Examples:
        >>> from normkit.moments import observe
        >>> rows = observe(torch.tensor([[1.0], [3.0]]))
        >>> [g.item() for g in gaussian_nll_gradients(rows, torch.tensor([0.0]), torch.tensor([1.0]))]
        [-2.0, -2.0]
        >>> all(g == 0 for g in gaussian_nll_gradients(rows, torch.tensor([2.0]), torch.tensor([1.0])))
        True
    """
    m1 = (moments.mean - mean) / sigma
    excess = (moments.variance + eps) / sigma.square() + m1.square() - 1
    if gradient == "plain":
        return -m1 / sigma, -excess
    return -sigma * m1, -excess / 2


_FEW = 1 << 14
"""Elements up to which batch normalization's kernel for statistics, which sums in float64, is faster on a CPU."""


def moments_about(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Moments:
    """Return the moments of the rows of ``x``, channels in dimension 1, faster than [`normkit.moments.observe`][].

    What is not finite stays so. Sums of ``n = (x - mu) / sigma`` and ``n^2`` cancel no digits as long as mu and sigma
    roughly fit, ``E x = mu + sigma E n`` and ``var x = sigma^2 (E n^2 - (E n)^2)``. Both sums are what the backward pass
    of batch normalization computes of a gradient n. Where batch normalization's kernel for statistics is as accurate and faster,
    it takes their place: on a GPU, and on a CPU for small inputs in contiguous memory.

    Args:
        x: ``(N, C, ...)``.
        mean: mu, ``(C,)``.
        variance: ``sigma^2 - eps``, ``(C,)``.
        eps: Added to the variance.

    Returns:
        Moments of C features, up to rounding those of ``observe(x, 1)``.
    """
    if x.dtype != mean.dtype or x.numel() == 0:
        return Moments(*(moment.to(mean.dtype) for moment in observe_unchecked(x, 1)))
    if kernels(x, mean) == "c" and (found := c_kernel.moments(x, mean)) is not None:
        return Moments(constant_count(x.numel() / x.shape[1], mean.dtype), *found)
    count = torch.full((), x.numel() / x.shape[1], dtype=mean.dtype, device=x.device)
    x = x.detach()
    if x.is_cuda or (x.is_cpu and x.numel() <= _FEW and x.is_contiguous()):
        center, spread = torch.batch_norm_update_stats(x, None, None, 0.0)
        return Moments(count, center, spread * count)
    n = F.batch_norm(x, mean, variance, training=False, eps=eps)
    zero = torch.zeros_like(mean)  # the mean of n, and with 1 added to it the variance
    _, square, total = torch.ops.aten.native_batch_norm_backward(
        n, n, None, zero, zero, None, None, False, 1.0, [False, True, True]
    )
    m1, sigma2 = total / count, variance + eps
    spread = torch.addcmul(square, total, m1, value=-1).clamp_(min=0).mul_(sigma2)
    return Moments(count, torch.addcmul(mean, sigma2.sqrt(), m1), spread)


def affine_map(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return ``(x - mu) / sqrt(variance + eps) * gamma + beta``, channels in dimension 1; only gamma makes it save ``x``.

    Args:
        x: ``(N, C, ...)``.
        mean: mu, ``(C,)``.
        variance: ``sigma^2 - eps``, ``(C,)``.
        weight: gamma ``(C,)`` or None.
        bias: beta ``(C,)`` or None.
        eps: Added to the variance.

    Returns:
        Shape and dtype of ``x``.
    """
    if weight is not None:
        if not x.dtype == mean.dtype == weight.dtype:
            dtype = torch.promote_types(x.dtype, mean.dtype)
            mean, variance, weight = mean.to(dtype), variance.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, cudnn)  # F.batch_norm less its checks
    shape = (-1, *[1] * (x.dim() - 2))
    scale = (variance + eps).rsqrt()
    return torch.addcmul((-mean * scale).view(shape), x, scale.view(shape)).to(x.dtype)


def per_feature(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Expand one value for each layer, ``()``, to one for each feature of all layers, ``(sum(sizes),)``."""
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])
