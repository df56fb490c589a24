"""Sums over a layer's input in one pass over memory, in C; see the source of the same name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.methods.kernels.compiled import Source
from normkit.methods.kernels.layout import layouts

_SOURCE = Source(
    Path(__file__).with_suffix(".c"), sums="ppiiiiip", moments="ppiiiiipp", sums_and_moments="piiiipppiiiippi"
)


class Sums:
    """Sum and sum of squares per feature of inputs of one shape and type, in one pass.

    Args:
        shape: Their shape, not empty.
        dtype: Their type.
        feature_dim: Dimension that holds the features.
        weights: How often each position counts, shaped as the dimensions behind the features; default once.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, feature_dim: int, weights: Tensor | None = None
    ) -> None:
        self._arguments = shape, dtype, feature_dim, weights
        self._layouts, self._shape = layouts(shape, feature_dim), (shape[feature_dim], 2)
        self._contiguous = self._layouts.contiguous
        library = _SOURCE.compiled(dtype)
        self._sums = None if library is None else library.sums
        self._weights = None if weights is None else weights.to(torch.float64).contiguous()
        self._taps = None if self._weights is None else self._weights.data_ptr()

    def __reduce__(self) -> tuple[type["Sums"], tuple[Any, ...]]:
        return Sums, self._arguments  # a copy finds the function anew

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return ``(features, 2)`` in float64, nothing recorded for autograd; None where the kernel cannot run."""
        layout = self._contiguous if x.is_contiguous() else self._layouts.of(x)
        if self._sums is None or layout is None:
            return None
        found = torch.empty(self._shape, dtype=torch.float64)
        self._sums(x.data_ptr(), self._taps, *layout, torch.get_num_threads(), found.data_ptr())
        return found


def moments(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and sum of squared deviations per channel, in one pass.

    Args:
        x: ``(N, C, ...)``, on a CPU, not empty; nothing is recorded for autograd.
        pivot: Numbers near the means, which keep the digits of the sums, ``(C,)``, in the dtype of ``x``.

    Returns:
        Two tensors ``(C,)``; None where the kernel cannot run.
    """
    library, layout = _SOURCE.compiled(x.dtype), layouts(x.shape, 1).of(x)
    if library is None or layout is None or not pivot.is_contiguous() or pivot.shape != layout[1:2]:
        return None
    mean, m2 = torch.empty_like(pivot), torch.empty_like(pivot)
    addresses = mean.data_ptr(), m2.data_ptr()
    library.moments(x.data_ptr(), pivot.data_ptr(), *layout, torch.get_num_threads(), *addresses)
    return mean, m2


class SumsAndMoments:
    """:class:`Sums` of a layer's input and :func:`moments` of its output; for small layers one call costs less than two.

    Args:
        shapes: Of input and output, not empty.
        dtype: Their type.
        feature_dims: The dimension of each that holds the features.
    """

    def __init__(
        self, shapes: tuple[Sequence[int], Sequence[int]], dtype: torch.dtype, feature_dims: tuple[int, int]
    ) -> None:
        self._arguments = shapes, dtype, feature_dims
        self._library = _SOURCE.compiled(dtype)
        self._x, self._y = (layouts(shape, dim) for shape, dim in zip(shapes, feature_dims, strict=True))
        self._shape = shapes[0][feature_dims[0]], 2

    def __reduce__(self) -> tuple[type["SumsAndMoments"], tuple[Any, ...]]:
        return SumsAndMoments, self._arguments  # a copy finds the function anew

    def __call__(self, x: Tensor, y: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the sums, the means and the sums of squared deviations; None where the kernel cannot run."""
        of_x, of_y = self._x.of(x), self._y.of(y)
        if self._library is None or of_x is None or of_y is None:
            return None
        if not pivot.is_contiguous() or pivot.shape != of_y[1:2]:
            return None
        sums = torch.empty(self._shape, dtype=torch.float64)
        mean, m2 = torch.empty_like(pivot), torch.empty_like(pivot)
        inputs = x.data_ptr(), *of_x, sums.data_ptr(), y.data_ptr(), pivot.data_ptr(), *of_y
        self._library.sums_and_moments(*inputs, mean.data_ptr(), m2.data_ptr(), torch.get_num_threads())
        return sums, mean, m2
