"""Sum and sum of squares of a layer's input: one pass over memory where a kernel runs, else the readable code."""

import torch
from torch import Tensor

from normkit import moments
from normkit.methods.kernels.rows import rows_of, use_triton
from normkit.moments import statistics_dtype


def sum_and_square_sum(
    x: Tensor, feature_dim: int = -1, dtype: torch.dtype | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sum and sum of squares over every dimension but ``feature_dim``.

    As :func:`normkit.moments.sum_and_square_sum`, and with weights as :func:`normkit.moments.weighted_sums`.

    Args:
        x: Activations; nothing is recorded for autograd.
        feature_dim: Dimension that holds the features.
        dtype: Dtype of the sums, default that of statistics of ``x``.
        weights: How often each position of a feature map counts, shaped as the dimensions behind ``feature_dim``; default
            once.

    Returns:
        Two tensors of shape ``(features,)``.
    """
    if use_triton(x) and (rows := rows_of(x, feature_dim)) is not None:
        from normkit.methods.kernels.triton_kernel import sums

        return sums(x, rows, dtype or statistics_dtype(x.dtype), weights)
    if weights is not None:
        return moments.weighted_sums(x, weights, dtype)
    return moments.sum_and_square_sum(x, feature_dim, dtype)
