"""Weights as rows of one shape, so that what every unit's row needs is computed for many layers with few operations.

Small operations cost their launch, not their arithmetic: layers of one shape are joined, worked on at once, and written back.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LARGEST_BATCH = 1 << 22
"""Elements that are worked on together at most: more gain nothing and would need memory."""

_JOINED = {"cpu": 1 << 14}
"""Elements up to which layers of one shape are joined, by device; larger ones are worked on where they lie.

On a CPU a copy costs as much as the operations that it saves."""


def most_joined(weight: Tensor) -> int:
    """Return how many layers with weights of this shape are joined at most.

    Args:
        weight: The weight of one of them, or its gradient.
    """
    size = max(1, weight.numel())
    return max(1, LARGEST_BATCH // size) if size <= _JOINED.get(weight.device.type, LARGEST_BATCH) else 1


class Layout:
    """A weight as the rows of its units, ``(groups, out, inputs times taps)``, and vectors that broadcast to them.

    Taps lie beside the channels, not in a dimension of their own: elementwise loops over three or nine taps are slow.
    Layers of one shape side by side, their weights joined along the first dimension, are one layer with more groups.

    Args:
        shape: Shape of the weight.
        groups: Groups of the convolution.
        transposed: Whether the weight is laid out as that of a transposed convolution.
        taps_first: Whether the channels of a tap lie side by side, as they do in the memory of channels-last weights.
    """

    def __init__(self, shape: Sequence[int], groups: int, transposed: bool, *, taps_first: bool = False) -> None:
        self.shape, self.groups, self.transposed, self.taps_first = tuple(shape), groups, transposed, taps_first
        self.taps = prod(shape[2:])
        first, second = shape[0] // groups, prod(shape[1:2])
        self.ins, self.outs = (first, second) if transposed else (second, first)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight-shaped tensor as rows."""
        if self.transposed:
            weight = weight.reshape(self.groups, self.ins, self.outs, self.taps).transpose(1, 2)
        elif self.taps_first:
            weight = weight.movedim(1, -1)
        return weight.reshape(self.groups, self.outs, -1)

    def joined_rows(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors shaped as the weights of the layers that are joined, as rows of the one; one where it lies, if it lies so."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat([*tensors])
        return self.rows(joined.to(dtype))

    def weight(self, rows: Tensor) -> Tensor:
        """Rows as a weight-shaped tensor."""
        if self.transposed:
            rows = rows.reshape(self.groups, self.outs, self.ins, self.taps).transpose(1, 2)
        elif self.taps_first:
            return rows.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)
        return rows.reshape(self.shape)

    def along_in(self, vector: Tensor) -> Tensor:
        """A vector over the inputs."""
        if self.taps_first:
            return vector.reshape(self.groups, 1, -1).repeat(1, 1, self.taps)
        return (vector if self.taps == 1 else vector.repeat_interleave(self.taps)).reshape(self.groups, 1, -1)

    def units(self, vector: Tensor) -> Tensor:
        """A vector over the output units."""
        return vector.reshape(self.groups, self.outs, 1)
