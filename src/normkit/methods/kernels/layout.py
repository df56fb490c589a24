"""How kernels for CPUs walk over the features of a tensor."""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TypeAlias

from torch import Tensor

from normkit.moments import CHANNELS_LAST

Layout: TypeAlias = tuple[int, int, int, bool]
"""Samples, features, positions, and whether the features of a position lie side by side."""


class Layouts:
    """The layouts that tensors of one shape can have.

    Args:
        shape: Their shape.
        feature_dim: Dimension that holds the features.

    Attributes:
        contiguous: That of contiguous tensors.

    Examples:
        >>> import torch
        >>> x = torch.zeros(2, 3, 4, 5)
        >>> Layouts(x.shape, 1).of(x), Layouts(x.shape, 1).of(x.to(memory_format=torch.channels_last))
        ((2, 3, 20, False), (2, 3, 20, True))
    """

    def __init__(self, shape: Sequence[int], feature_dim: int) -> None:
        first = feature_dim % len(shape)
        samples, features, positions = prod(shape[:first]), shape[first], prod(shape[first + 1 :])
        self.contiguous = samples, features, positions, positions == 1
        self._format = CHANNELS_LAST.get(len(shape)) if first == 1 else None
        self._channels_last = samples, features, positions, True

    def of(self, x: Tensor) -> Layout | None:
        """Return that of ``x``; None where kernels cannot read it."""
        if x.is_contiguous():
            return self.contiguous
        if self._format is not None and x.is_contiguous(memory_format=self._format):
            return self._channels_last
        return None


layouts = lru_cache(maxsize=256)(Layouts)
"""The layouts of a shape, made once: a small layer costs its Python."""


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape lie without gaps and in the same order: contiguous, or both channels-last."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    memory_format = CHANNELS_LAST.get(a.dim())
    return (
        memory_format is not None
        and a.is_contiguous(memory_format=memory_format)
        and b.is_contiguous(memory_format=memory_format)
    )
