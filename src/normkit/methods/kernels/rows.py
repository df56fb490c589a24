"""How a kernel walks over the rows of a tensor."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 2048  # elements that a program reads at a time
_PROGRAMS = 1024  # enough to fill a GPU; each leaves one partial sum per feature


class Rows(NamedTuple):
    """A dense tensor as rows of features.

    Row ``r`` begins at ``r // inner * outer_stride + r % inner * inner_stride``, feature ``f`` lies ``f * feature_stride``
    behind it.
    """

    rows: int
    inner: int
    features: int
    outer_stride: int
    inner_stride: int
    feature_stride: int

    @property
    def blocks(self) -> dict[str, int]:
        """Rows and features of a tile; features side by side in memory are read together."""
        features = min(1 << (self.features - 1).bit_length(), 64) if self.feature_stride == 1 else 1
        return {"BLOCK_ROWS": _TILE // features, "BLOCK_FEATURES": features}

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along rows and along features."""
        blocks = self.blocks
        wide = -(-self.features // blocks["BLOCK_FEATURES"])
        return min(-(-self.rows // blocks["BLOCK_ROWS"]), max(1, _PROGRAMS // wide)), wide


def rows_of(x: Tensor, feature_dim: int) -> Rows | None:
    """Return the layout of ``x`` as rows; None if ``x`` is empty, not dense, or of a type that kernels do not take.

    Examples:
        >>> rows_of(torch.zeros(2, 3, 4, 4), 1)
        Rows(rows=32, inner=16, features=3, outer_stride=48, inner_stride=1, feature_stride=16)
        >>> rows_of(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), 1)
        Rows(rows=32, inner=1, features=3, outer_stride=3, inner_stride=0, feature_stride=1)
    """
    if x.dtype not in _TYPES or x.numel() == 0 or x.dim() == 0:
        return None
    features = x.shape[feature_dim]
    rows = x.numel() // features
    if x.movedim(feature_dim, -1).is_contiguous():
        return Rows(rows, 1, features, features, 0, 1)
    if not x.is_contiguous():
        return None
    inner = x.stride(feature_dim)
    return Rows(rows, inner, features, features * inner, 1, inner)


def on_device(x: Tensor) -> Any:
    """A context in which a kernel is launched on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()
