"""Whether a subclass still computes what the layer does that it derives from; where its forward is its own, by trying it out."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normkit.inspection.norms import features_of, stated_type

_SPACES = ((6,), (3, 2), (3, 2, 1))


@torch.no_grad()
def computes_as_its_type(norm: nn.Module) -> bool:
    """Whether ``norm`` computes in eval mode what torch's layer would, or this package's, of which its type is a subclass.

    A type with a forward of its own is tried out, on a copy whose tensors are all neither zero nor alike.

    Args:
        norm: A normalization layer that has its shape.
    """
    parent = stated_type(norm)
    own: Any = type(norm)
    if own.forward is parent.forward:
        return True
    probe = _probe(norm)
    if probe is None:
        return False
    probe.eval()
    agreed = False
    for x in _inputs(norm):
        try:  # each kind of layer refuses the other shapes in its own way
            expected, actual = parent.forward(probe, x), own.forward(probe, x)
        except Exception:
            continue
        if not _same(actual, expected):
            return False
        agreed = True
    return agreed


def _inputs(norm: nn.Module) -> list[Tensor]:
    """Inputs of every number of dimensions that a normalization layer may take."""
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        shapes = [(2, *space, *norm.normalized_shape) for space in _SPACES]
    else:
        shapes = [(2, features_of(norm), *space) for space in ((), *_SPACES)]
    return [_line(*shape) for shape in shapes]


def has_torch_forward(layer: nn.Module) -> bool:
    """Whether the layer computes as torch's own does, so that a bias it is given takes effect."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    names = ("forward", "_conv_forward")
    return any(
        isinstance(layer, cls) and all(getattr(type(layer), name, None) is getattr(cls, name, None) for name in names)
        for cls in plain
    )


@torch.no_grad()
def scales_with_its_filters(layer: nn.Linear | _ConvNd) -> bool:
    """Whether a positive factor on a filter is one on its output, or none at all (a standardised weight); the bias apart.

    Args:
        layer: A linear or (not transposed) convolution layer.
    """
    if has_torch_forward(layer):
        return True
    own: Any = type(layer)
    probe = _probe(layer)
    if probe is None:
        return False
    if probe.bias is not None:
        probe.bias.zero_()
    factors = torch.linspace(0.5, 2, len(probe.weight))
    if isinstance(probe, _ConvNd):
        space = [dilation * (size - 1) + 3 for size, dilation in zip(probe.kernel_size, probe.dilation, strict=True)]
        x, shape = _line(2, probe.in_channels, *space), (-1, *(1 for _ in space))
    else:
        x, shape = _line(2, probe.in_features), (-1,)
    with torch.random.fork_rng(devices=()):
        outputs = []
        for factor in (torch.ones_like(factors), factors):
            probe.weight.mul_(factor.view(-1, *(1 for _ in probe.weight.shape[1:])))
            torch.manual_seed(0)
            try:
                outputs.append(own.forward(probe, x))
            except Exception:  # a forward with other arguments may raise anything
                return False
    before, after = outputs
    return isinstance(before, Tensor) and any(_same(after, before * f) for f in (1, factors.view(shape)))


def _same(actual: Any, expected: Tensor) -> bool:
    fits = isinstance(actual, Tensor) and actual.shape == expected.shape
    return fits and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)


def _probe(layer: nn.Module) -> Any:
    """A copy that may be tried out, or None of a layer that cannot be copied, as it keeps tensors of a graph."""
    try:
        probe = copy.deepcopy(layer).to_empty(device="cpu").float()
    except RuntimeError:
        return None
    for tensor in (*probe.parameters(), *probe.buffers()):
        tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor))
    return probe


def _line(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape).numel()).reshape(shape)
