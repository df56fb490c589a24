"""Sum and sum of squares of a layer's input in one pass over memory. Imported only where Triton is."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from normkit.methods.kernels.rows import Rows, on_device


@triton.jit
def _sums(
    x, taps, partial, positions, rows, inner, features, outer_stride, inner_stride, feature_stride,
    WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    real = f < features
    total = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], DTYPE)
    square = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], DTYPE)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        inside = (r < rows)[:, None] & real[None, :]
        offset = (r // inner).to(tl.int64) * outer_stride + (r % inner) * inner_stride
        offset = offset[:, None] + f.to(tl.int64)[None, :] * feature_stride
        h = tl.load(x + offset, mask=inside, other=0.0).to(DTYPE)
        if WEIGHTED:
            wh = h * tl.load(taps + r % positions, mask=r < rows, other=0.0).to(DTYPE)[:, None]
            total += wh
            square += wh * h
        else:
            total += h
            square += h * h
    at = partial + tl.program_id(0) * 2 * features + f
    tl.store(at, tl.sum(total, 0), mask=real)
    tl.store(at + features, tl.sum(square, 0), mask=real)


def sums(x: Tensor, rows: Rows, dtype: torch.dtype, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares per feature: ``normkit.moments.sum_and_square_sum`` and ``weighted_sums`` in one pass.

    Args:
        x: Input of a layer; nothing is recorded for autograd.
        rows: Where the rows of ``x`` lie, see ``normkit.methods.kernels.rows.rows_of``.
        dtype: Dtype of the sums, float32 or float64.
        weights: How often each position counts, shaped as the positions of an instance; default once.

    Returns:
        Two tensors of shape ``(features,)``.
    """
    partial = torch.empty(rows.grid[0], 2, rows.features, dtype=dtype, device=x.device)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    with on_device(x):
        taps, positions = (x, 1) if weights is None else (weights.to(dtype).contiguous(), weights.numel())
        _sums[rows.grid](x.detach(), taps, partial, positions, *rows, weights is not None, wide, **rows.blocks)
    total, square = partial.sum(0)
    return total, square
