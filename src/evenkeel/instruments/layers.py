"""Which layers a model has and in which order they run."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from evenkeel.instruments.guard import Probe
from evenkeel.methods.lp_norm import LpNorm

WEIGHTED = (nn.Linear, _ConvNd)
Hook: TypeAlias = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the module normalizes with statistics of the batch in its present mode."""
    return isinstance(module, _BatchNorm | LpNorm) and (module.training or module.running_mean is None)


def running_statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Running mean and variance (the square of what it divides by) with which a layer evaluates, or None."""
    if isinstance(module, LpNorm) and module.running_mean is not None and module.running_scale is not None:
        return module.running_mean, module.running_scale.square()
    if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
        return module.running_mean, module.running_var
    return None


def tensor_in(value: Any) -> Tensor | None:
    """The first floating-point tensor of two or more dimensions in what a module takes or returns."""
    if isinstance(value, Tensor):
        return value if value.ndim > 1 and value.is_floating_point() else None
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return next((t for t in map(tensor_in, value) if t is not None), None)
    return None


@contextmanager
def watched(layers: Iterable[tuple[str, nn.Module]], hook: Hook) -> Generator[None, None, None]:
    """Call ``hook(name, module, inputs, output)`` after every forward of the given layers."""
    handles = []
    try:
        for name, module in layers:
            handles.append(module.register_forward_hook(partial(hook, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_order(probe: Probe) -> list[tuple[str, nn.Module]]:
    """Modules that own parameters themselves, in the order in which one forward pass first reaches them."""
    owners = {n: m for n, m in probe.model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    seen: dict[str, nn.Module] = {}
    handles = []
    try:
        for name, module in owners.items():
            handles.append(module.register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m})))
        with torch.no_grad():
            probe.loss()
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.items())
