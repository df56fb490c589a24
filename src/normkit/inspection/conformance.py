"""Decide whether a subclass computes what its base layer computes; a forward of its own is tried out."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from normkit.inspection.norms import PRODUCERS, features_of, stated_type

_SPACES = ((6,), (3, 2), (3, 2, 1))


@torch.no_grad()
def computes_as_its_type(layer: nn.Module) -> bool:
    """Return whether ``layer`` computes what its base class, torch's or this package's, would compute.

    A type with a forward of its own is tried out, on a copy whose tensors are all neither zero nor alike: a normalization in
    eval mode, a linear or convolution layer, whose weight may be masked, standardised or noisy, in both modes.

    Args:
        layer: A normalization, linear or convolution layer that has its shape.
    """
    parent = stated_type(layer)
    own = type(layer)
    names = ("forward", "_conv_forward")
    if "forward" not in vars(layer) and all(getattr(own, n, None) is getattr(parent, n, None) for n in names):
        return True
    probe = _probe(layer)
    if probe is None:
        return False
    plain = copy.copy(probe)
    plain.__class__ = parent
    agreed = False
    with torch.random.fork_rng(devices=()):
        for mode in (False, True) if isinstance(layer, PRODUCERS) else (False,):
            probe.train(mode)
            for x in _inputs(layer):
                try:  # each kind of layer refuses the other shapes in its own way
                    expected, actual = parent.forward(plain.train(mode), x), probe.forward(x)
                except Exception:
                    continue
                if not _same(actual, expected):
                    return False
                agreed = True
    return agreed


@torch.no_grad()
def applies_children(norm: nn.Module) -> bool:
    """Return whether ``norm`` computes in eval mode what its base class does, followed by its children in order.

    So do layers with an activation built in (BatchNormAct2d of timm). The children may have no parameters.
    """
    if not any(True for _ in norm.children()) or any(True for child in norm.children() for _ in child.parameters()):
        return False
    parent, probe = stated_type(norm), _probe(norm)
    if probe is None:
        return False
    agreed = False
    for x in _inputs(norm):
        try:  # each kind of layer refuses the other shapes in its own way
            expected, actual = parent.forward(probe.eval(), x), probe.forward(x)
            for child in probe.children():
                expected = child(expected)
        except Exception:
            continue
        if not _same(actual, expected):
            return False
        agreed = True
    return agreed


def _inputs(layer: nn.Module) -> list[Tensor]:
    """Inputs of every number of dimensions that a layer may take."""
    if isinstance(layer, _ConvNd):
        space = [dilation * (size - 1) + 3 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        shapes = [(2, layer.in_channels, *space)]
    elif isinstance(layer, nn.Linear):
        shapes = [(2, layer.in_features), (2, 3, layer.in_features)]
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        shapes = [(2, *space, *layer.normalized_shape) for space in _SPACES]
    else:
        shapes = [(2, features_of(layer), *space) for space in ((), *_SPACES)]
    return [_line(*shape) for shape in shapes]


@torch.no_grad()
def linear_map(module: nn.Module) -> Literal["rows", "columns"] | None:
    """Return how a linear layer other than ``nn.Linear`` holds its weight, or None for other modules.

    ``rows``: ``x W^T + b``, as PyTorch Geometric's layer; ``columns``: ``x W + b``, as the Conv1D of transformers. It is tried
    out, on a copy.
    """
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    others = module._parameters.keys() - {"weight", "bias"}
    if weight is None or isinstance(module, PRODUCERS) or is_lazy(weight) or weight.ndim != 2 or others:
        return None
    if any(True for _ in module.children()) or type(module).__module__.startswith("torch.nn."):
        return None
    probe = _probe(module)
    if probe is None:
        return None
    kinds: tuple[tuple[Literal["rows", "columns"], Tensor], ...] = (("rows", probe.weight), ("columns", probe.weight.T))
    for kind, matrix in kinds:
        shift = None if bias is None else probe.bias
        try:  # a module of an unknown type may raise anything
            fits = all(
                _same(probe.forward(x), nn.functional.linear(x, matrix, shift))
                for x in (_line(2, matrix.shape[1]), _line(2, 3, matrix.shape[1]))
            )
        except Exception:
            continue
        if fits:
            return kind
    return None


def has_torch_forward(layer: nn.Module) -> bool:
    """Return whether the layer uses torch's own forward, so that a bias given to it takes effect."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    names = ("forward", "_conv_forward")
    return any(
        isinstance(layer, cls) and all(getattr(type(layer), name, None) is getattr(cls, name, None) for name in names)
        for cls in plain
    )


@torch.no_grad()
def scales_with_its_filters(layer: nn.Linear | _ConvNd) -> bool:
    """Return whether scaling a filter scales its output without bias, or (standardized weight) leaves it unchanged.

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
    x = _inputs(probe)[0]
    shape = (-1, *(1 for _ in x.shape[2:]))
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
    """A copy that may be tried out, or None of a layer that cannot be copied."""
    try:
        probe = copy.deepcopy(layer).to_empty(device="cpu").float()
    except RuntimeError:
        return None
    for tensor in (*probe.parameters(), *probe.buffers()):
        tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor))
    return probe


def _line(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, torch.Size(shape).numel()).reshape(shape)
