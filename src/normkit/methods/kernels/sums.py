"""Sum and sum of squares of a layer's input: one pass over memory where a kernel runs, else the readable two."""

import torch
from torch import Tensor

from normkit import moments
from normkit.methods.kernels.rows import rows_of, use_triton
from normkit.moments import statistics_dtype


def sum_and_square_sum(x: Tensor, feature_dim: int = -1, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over every dimension but ``feature_dim``, as :func:`normkit.moments.sum_and_square_sum`.

    Args:
        x: Activations; nothing is recorded for autograd.
        feature_dim: Dimension that holds the features.
        dtype: Dtype of the sums, default that of statistics of ``x``.

    Returns:
        Two tensors of shape ``(features,)``.
    """
    if use_triton(x) and (rows := rows_of(x, feature_dim)) is not None:
        from normkit.methods.kernels.triton_kernel import sums

        return sums(x, rows, dtype or statistics_dtype(x.dtype))
    return moments.sum_and_square_sum(x, feature_dim, dtype)
