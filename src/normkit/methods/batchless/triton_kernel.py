"""Forward and backward pass of a batchless layer (arXiv 2212.14729) in Triton, each in one pass over memory.

``one_pass.py`` gives both to autograd. Each program sums a share of the rows; the shares are added in a fixed order, so results
do not change from run to run. Imported only where Triton is.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkit.methods.kernels.rows import Rows, on_device
from normkit.moments import Moments


@triton.jit
def _forward(
    x, y, partial, mean, inverse, gamma, beta,
    rows, inner, features, outer_stride, inner_stride, feature_stride,
    AFFINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    real = f < features
    mu = tl.load(mean + f, mask=real, other=0.0)[None, :]
    inv = tl.load(inverse + f, mask=real, other=0.0)[None, :]
    scale, shift = 1.0, 0.0
    if AFFINE:
        scale = tl.load(gamma + f, mask=real, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(beta + f, mask=real, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    square = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        inside = (r < rows)[:, None] & real[None, :]
        offset = (r // inner).to(tl.int64) * outer_stride + (r % inner) * inner_stride
        offset = offset[:, None] + f.to(tl.int64)[None, :] * feature_stride
        n = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - mu) * inv
        n = tl.where(inside, n, 0.0)
        total += n
        square += n * n
        tl.store(y + offset, (n * scale + shift).to(y.dtype.element_ty), mask=inside)
    at = partial + tl.program_id(0) * 2 * features + f
    tl.store(at, tl.sum(total, 0), mask=real)
    tl.store(at + features, tl.sum(square, 0), mask=real)


@triton.jit
def _backward(
    dy, x, dx, partial, mean, inverse, gamma,
    rows, inner, features, outer_stride, inner_stride, feature_stride,
    WRITE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    real = f < features
    mu = tl.load(mean + f, mask=real, other=0.0)[None, :]
    inv = tl.load(inverse + f, mask=real, other=0.0)[None, :]
    slope = tl.load(gamma + f, mask=real, other=0.0).to(tl.float32)[None, :] * inv
    d_gamma = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    d_beta = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        inside = (r < rows)[:, None] & real[None, :]
        offset = (r // inner).to(tl.int64) * outer_stride + (r % inner) * inner_stride
        offset = offset[:, None] + f.to(tl.int64)[None, :] * feature_stride
        d = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        n = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - mu) * inv
        d_beta += d
        d_gamma += tl.where(inside, d * n, 0.0)
        if WRITE:
            tl.store(dx + offset, (d * slope).to(dx.dtype.element_ty), mask=inside)
    at = partial + tl.program_id(0) * 2 * features + f
    tl.store(at, tl.sum(d_beta, 0), mask=real)
    tl.store(at + features, tl.sum(d_gamma, 0), mask=real)


def affine_with_moments(
    x: Tensor, rows: Rows, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """``(x - mu) / sigma * gamma + beta`` and the moments of the rows of ``x``, in one pass.

    Args:
        x: ``(N, C, ...)``.
        rows: Where the rows of ``x`` lie, see ``normkit.methods.kernels.rows.rows_of``.
        mean: mu in fp32, ``(C,)``.
        variance: ``sigma^2 - eps`` in fp32, ``(C,)``.
        weight: gamma ``(C,)``, or None together with ``bias``.
        bias: beta ``(C,)``, or None.
        eps: Added to the variance.

    Returns:
        Output, in shape, dtype and layout of ``x``, and moments of C features.
    """
    y, sigma2 = torch.empty_like(x), variance + eps
    partial = mean.new_empty(rows.grid[0], 2, rows.features)
    with on_device(x):
        _forward[rows.grid](x, y, partial, mean, sigma2.rsqrt(), weight, bias, *rows, weight is not None, **rows.blocks)
    total, square = partial.sum(0)
    count = torch.full((), rows.rows, dtype=mean.dtype, device=x.device)
    m1 = total / count
    return y, Moments(count, mean + sigma2.sqrt() * m1, (square - total * m1).clamp(min=0) * sigma2)


def affine_gradients(
    dy: Tensor,
    x: Tensor,
    rows: Rows,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    eps: float,
    *,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``dx = gamma dy / sigma``, ``d gamma = sum dy n`` and ``d beta = sum dy``, in one pass over ``(x, dy)``.

    Args:
        dy: Gradient of the output, shape of ``x``.
        x: ``(N, C, ...)``.
        rows: Where the rows of ``x`` lie, see ``normkit.methods.kernels.rows.rows_of``.
        mean: mu in fp32, ``(C,)``.
        variance: ``sigma^2 - eps`` in fp32, ``(C,)``.
        weight: gamma, ``(C,)``.
        eps: Added to the variance.
        needs_dx: Whether dx is computed.

    Returns:
        dx in shape, dtype and layout of ``x``, or None, and d gamma and d beta in fp32, ``(C,)`` each.
    """
    if dy.stride() != x.stride():
        dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    dx = torch.empty_like(x) if needs_dx else None
    partial = mean.new_empty(rows.grid[0], 2, rows.features)
    with on_device(x):
        _backward[rows.grid](
            dy, x, dx, partial, mean, (variance + eps).rsqrt(), weight, *rows, needs_dx, **rows.blocks
        )  # fmt: skip
    d_beta, d_gamma = partial.sum(0)
    return dx, d_gamma, d_beta
