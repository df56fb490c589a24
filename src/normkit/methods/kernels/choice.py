"""Choose where kernels replace the readable code: Triton's on CUDA devices, compiled C on CPUs.

The environment variable ``NORMKIT_KERNELS``, read once in a process, is the one switch: ``0`` turns all kernels off, ``triton``
uses Triton's on a CPU too, where ``TRITON_INTERPRET=1`` lets its interpreter run them.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from normkit.methods.kernels.compiled import has_compiler

SWITCH = "NORMKIT_KERNELS"

Kind: TypeAlias = Literal["triton", "c"]

_PLAIN = (Tensor, torch.nn.Parameter)
_transforming = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]
_dispatching = torch._C._len_torch_dispatch_stack


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def _switch() -> str:
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "triton"):
        raise ValueError(
            f"{SWITCH}={value}: set it to 0 (no kernels) or triton (Triton's on CPUs too), or leave it unset"
        )
    return value


chosen = _switch()
"""What ``NORMKIT_KERNELS`` said when this process started; empty where it is not set."""


def kernels(*tensors: Tensor) -> Kind | None:
    """Return which kernels run on these tensors; None where the readable code runs.

    ``torch.compile`` fuses the readable code itself, and neither function transforms nor dispatch modes (fake tensors, operation
    counters) can see into a kernel.
    """
    if torch.compiler.is_compiling() or chosen == "0" or _transforming() or _dispatching() or not tensors:
        return None
    on_cpu = tensors[0].is_cpu
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            return None
        if tensor.is_cpu != on_cpu or not (on_cpu or tensor.is_cuda):
            return None
    if on_cpu and chosen != "triton":
        return "c"
    return "triton" if has_triton() else None


def kernels_on(device: str) -> str:
    """Which kernels this process can use on a device, in a word: ``Triton``, ``C`` or ``none``."""
    if chosen == "0":
        return "none"
    if device.startswith("cuda") or chosen == "triton":
        return "Triton" if has_triton() else "none"
    return "C" if device == "cpu" and has_compiler() else "none"
