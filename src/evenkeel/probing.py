"""Whether a subclass of a normalization layer still computes what the layer does that it derives from."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.targets import features_of

_SPACES = ((6,), (3, 2), (3, 2, 1))


@torch.no_grad()
def computes_as_its_type(norm: nn.Module) -> bool:
    """Whether ``norm`` computes in eval mode what torch's layer would, or this package's, of which its type is a subclass.

    A type with a forward of its own is tried out, on a copy whose tensors are all neither zero nor alike.

    Args:
        norm: A normalization layer that has its shape.
    """
    parent: Any = next(c for c in type(norm).__mro__ if c.__module__.startswith(("torch.nn.", "evenkeel.")))
    own: Any = type(norm)
    if own.forward is parent.forward:
        return True
    probe = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    for tensor in (*probe.parameters(), *probe.buffers()):
        tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor))
    agreed = False
    for x in _inputs(norm):
        try:  # each kind of layer refuses the other shapes in its own way
            expected, actual = parent.forward(probe, x), own.forward(probe, x)
        except Exception:
            continue
        if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3):
            return False
        agreed = True
    return agreed


def _inputs(norm: nn.Module) -> list[Tensor]:
    """Inputs of every number of dimensions that a normalization layer may take."""
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        shapes = [(2, *space, *norm.normalized_shape) for space in _SPACES]
    else:
        shapes = [(2, features_of(norm), *space) for space in ((), *_SPACES)]
    return [torch.linspace(-2, 2, torch.Size(shape).numel()).reshape(shape) for shape in shapes]
