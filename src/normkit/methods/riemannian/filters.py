"""Filters as rows: layouts, shards, the clip of a row and the penalty that keeps rows apart.

What the optimizers of arXiv 1709.09603 do to a filter needs only inner products and sums of whole rows, so it neither
matters in which order a row's elements lie in memory, nor with which other rows of the same length a row is stacked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.methods.riemannian.sphere import norm
from normkit.moments import statistics_dtype
from normkit.optim.unit_filters import local


@dataclass(slots=True)
class Filters:
    """One weight on the sphere, with its gradient and state.

    Attributes:
        y: The weight, shape ``(C_out, ...)``, dimensions in the order of memory; shares memory with the parameter.
        gradient: Returns the gradient, that of the orthogonality penalty included.
        tau: Momentum in the layout of ``y``, float32 or wider.
        v: Second moment per filter, ``(C_out, 1)``, or None.
        correction: Bias correction of the learning rate, a number or a 0-dim tensor.
    """

    y: Tensor
    gradient: Callable[[], Tensor]
    tau: Tensor
    v: Tensor | None
    correction: float | Tensor

    @property
    def fan_in(self) -> int:
        """Elements per filter."""
        return math.prod(self.y.shape[1:])

    @property
    def in_place(self) -> bool:
        """Whether the rows can be updated where they lie."""
        return self.y.dtype == self.tau.dtype and self.y.is_contiguous() and self.tau.is_contiguous()


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of ``x`` by falling stride, the first kept first, or None where they are in that order already.

    Examples:
        >>> x = torch.zeros(8, 3, 5, 5)
        >>> memory_order(x), memory_order(x.to(memory_format=torch.channels_last))
        (None, (0, 2, 3, 1))
    """
    return None if x.is_contiguous() else (0, *sorted(range(1, x.ndim), key=lambda dim: -x.stride(dim)))


def arranged(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """Return this rank's part of ``x`` with its dimensions in the given order."""
    x = local(x)
    return x if order is None else x.permute(order)


def rows(x: Tensor) -> Tensor:
    """View ``(C_out, ...)`` as ``(C_out, fan-in)``."""
    return x.flatten(1)


def clip_rows(h: Tensor, max_norm: float) -> Tensor:
    """Shorten each filter to at most ``max_norm``: ``h min(1, max_norm / |h|)``.

    Args:
        h: One filter per row, ``(..., n)``.
        max_norm: Bound on a row's length; ``math.inf`` for none.

    Returns:
        The rows, as ``h``.

    Examples:
        >>> clip_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1.0).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return h * (max_norm / norm(h)).clamp(max=1)


def orthogonality_gradient(y: Tensor, alpha: float, others: Tensor | None = None) -> Tensor:
    """Return the gradient ``2 alpha (W W^T - I) W`` of the penalty ``(alpha / 2) |W W^T - I|_F^2`` on the filters ``W``.

    Args:
        y: Filters whose gradient is wanted, unit rows of shape ``(rows, n)``.
        alpha: Strength.
        others: All filters of the weight, shape ``(C_out, n)``, when ``y`` is a shard of them.

    Returns:
        The gradient, shape ``(rows, n)``.

    Examples:
        >>> orthogonality_gradient(torch.eye(2, 3), alpha=0.1).abs().max().item()
        0.0
    """
    others = y if others is None else others
    return torch.addmm(y, y @ others.T, others, beta=-2 * alpha, alpha=2 * alpha)


def wide(x: Tensor) -> Tensor:
    """Return half precision as float32, other dtypes unchanged."""
    return x.to(statistics_dtype(x.dtype))
