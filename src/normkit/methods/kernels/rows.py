"""Choose where Triton kernels replace the readable code, and how a kernel walks over the rows of a tensor.

Kernels run on CUDA devices. The environment variable ``NORMKIT_TRITON`` is the one switch: ``0`` turns them off, ``1`` uses them
on a CPU too, where ``TRITON_INTERPRET=1`` lets Triton's interpreter run them.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

SWITCH = "NORMKIT_TRITON"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 2048  # elements that a program reads at a time
_PROGRAMS = 1024  # enough to fill a GPU; each leaves one partial sum per feature


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def use_triton(*tensors: Tensor) -> bool:
    """Return whether kernels run on these tensors: by device, unless ``NORMKIT_TRITON`` says otherwise.

    ``torch.compile`` fuses the readable code itself, and function transforms cannot see into a kernel.
    """
    if torch.compiler.is_compiling() or not has_triton():
        return False
    switch = os.environ.get(SWITCH)
    if switch == "0" or not (switch == "1" or all(tensor.is_cuda for tensor in tensors)):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


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
