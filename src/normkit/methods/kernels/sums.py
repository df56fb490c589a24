"""Sum and sum of squares of a layer's input: one pass over memory where a kernel runs, else the readable code."""

import torch
from torch import Tensor

from normkit import moments
from normkit.methods.kernels import c_kernel
from normkit.methods.kernels.choice import kernels
from normkit.methods.kernels.rows import rows_of
from normkit.moments import statistics_dtype


class RowSums:
    """Sum and sum of squares over every dimension but one, with a weight for each position, of inputs of one shape.

    As :func:`normkit.moments.sum_and_square_sum`, and with weights as :func:`normkit.moments.weighted_sums`.

    Args:
        x: Such an input.
        feature_dim: Dimension that holds the features.
        dtype: Dtype of the sums, default that of statistics of ``x``; the kernel for CPUs always gives float64.
        weights: How often each position of a feature map counts, shaped as the dimensions behind ``feature_dim``; default
            once.
    """

    def __init__(
        self, x: Tensor, feature_dim: int, dtype: torch.dtype | None = None, weights: Tensor | None = None
    ) -> None:
        self._feature_dim, self._weights = feature_dim, weights
        self._dtype = dtype or statistics_dtype(x.dtype)
        self._kernel = None
        if kernels(x) == "c" and x.numel():
            self._kernel = c_kernel.Sums(x.shape, x.dtype, feature_dim, weights)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sums, ``(features, 2)``; nothing is recorded for autograd."""
        kind = kernels(x)
        if kind == "c" and self._kernel is not None and (found := self._kernel(x)) is not None:
            return found
        if kind == "triton" and (rows := rows_of(x, self._feature_dim)) is not None:
            from normkit.methods.kernels.triton_kernel import sums

            pair = sums(x, rows, self._dtype, self._weights)
        elif self._weights is not None:
            pair = moments.weighted_sums(x, self._weights, self._dtype)
        else:
            pair = moments.sum_and_square_sum(x, self._feature_dim, self._dtype)
        return torch.stack(pair, 1)
