"""Which layers a model has, in which order they run, and with which statistics they normalize."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from normkit import moments
from normkit.inspection.graph import dataflow, is_norm
from normkit.inspection.probe import Probe
from normkit.methods.batchless.layer import BatchlessNorm
from normkit.methods.lp_norm import LpNorm, lp_statistics

WEIGHTED = (nn.Linear, _ConvNd)
Hook: TypeAlias = Callable[[str, nn.Module, Any, Any], None]
_RECTIFIERS = {"relu", "relu6", "threshold"}


class Statistics(NamedTuple):
    """Mean and variance per channel, the variance with the layer's eps in it: its root is what the layer divides by."""

    mean: Tensor
    variance: Tensor


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the module normalizes with statistics of the batch in its present mode."""
    return isinstance(module, _BatchNorm | LpNorm) and (module.training or module.running_mean is None)


def running_statistics(module: nn.Module) -> Statistics | None:
    """A copy of the statistics with which a layer evaluates, or None where it has none of its own."""
    if not isinstance(module, _BatchNorm | LpNorm | BatchlessNorm):
        return None
    if module.running_mean is None or module.running_var is None:
        return None
    return Statistics(module.running_mean.detach().clone(), module.running_var.detach() + module.eps)


def batch_statistics(module: nn.Module, x: Tensor) -> tuple[Statistics, Tensor]:
    """The statistics with which a layer would normalize ``x``, and the share of eps in its divisor, per channel."""
    eps: float = module.eps  # pyright: ignore[reportAssignmentType]
    if isinstance(module, LpNorm):
        mean, scale = lp_statistics(x.detach(), module.p)
        return Statistics(mean, (scale + eps).square()), eps / (scale + eps)
    seen = moments.observe(x, feature_dim(module))
    return Statistics(seen.mean, seen.variance + eps), eps / (seen.variance + eps)


def feature_dim(module: nn.Module) -> int:
    """The dimension of a layer's output that holds its features."""
    return -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm) else getattr(module, "feature_dim", 1)


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Normalization, linear and convolution layers with their paths."""
    return [(name, m) for name, m in model.named_modules() if is_norm(m) or isinstance(m, WEIGHTED)]


def rectified(model: nn.Module) -> frozenset[str]:
    """Paths of the layers whose output goes through a ReLU and nowhere else, as far as the model traces."""
    flow, modules = dataflow(model), dict(model.named_modules())

    def rectifies(index: int) -> bool:
        step = flow.steps[index]
        if step.name == "module" and step.path is not None:
            return isinstance(modules[step.path], nn.ReLU | nn.ReLU6)
        return step.name in _RECTIFIERS

    def ends_in_relu(index: int) -> bool:
        consumers = flow.consumers(index)
        return len(consumers) == 1 and rectifies(consumers[0])

    return frozenset(n for n, _ in layers(model) if flow.calls(n) and all(map(ends_in_relu, flow.calls(n))))


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
def watched(
    layers: Iterable[tuple[str, nn.Module]], after: Hook | None = None, *, before: Hook | None = None
) -> Generator[None, None, None]:
    """Call ``after(name, module, inputs, output)`` and ``before(name, module, inputs, None)`` at every forward."""

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert before is not None
        before(name, module, (args, kwargs), None)

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert after is not None
        after(name, module, (args, kwargs), output)

    handles = []
    try:
        for name, module in layers:
            if before is not None:
                handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_order(probe: Probe) -> list[tuple[str, nn.Module]]:
    """Modules that own parameters themselves, in the order in which one forward pass first reaches them."""
    owners = [(n, m) for n, m in probe.model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    seen: dict[str, nn.Module] = {}

    def enter(name: str, module: nn.Module, _: Any, __: Any) -> None:
        seen.setdefault(name, module)

    with watched(owners, before=enter), torch.no_grad():
        probe.loss()
    return list(seen.items())
