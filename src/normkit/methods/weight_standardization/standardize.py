"""Convolution filters standardized in the forward pass, as a parametrization of the weight.

Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, Siyuan Qiao, Huiyu Wang, Chenxi Liu, Wei
Shen, Alan Yuille, arXiv 1903.10520. For the filter W of an output channel, with mean mu and variance sigma^2 of its N weights
(input channels of its group times kernel positions), the convolution uses

    (W - mu) / sqrt(sigma^2 + eps)

The optimizer trains W. The layer keeps its class, its parameters, its hooks and its place; state dicts of the plain model load.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.inspection.conformance import has_torch_forward
from normkit.inspection.graph import Dataflow, Step, dataflow
from normkit.moments import is_channels_last, statistics_dtype
from normkit.optim.effect import Effect, count
from normkit.optim.invariance import HOMOGENEOUS, HOMOGENEOUS_MODULES

_logger = logging.getLogger("normkit")

# What keeps the scale of its inputs relative to one another, so that a normalization behind it removes it.
_KEEP_SCALE = HOMOGENEOUS | {"contiguous", "cat", "concat", "concatenate", "add", "sub", "pad", "interpolate"}
_KEEP_SCALE_MODULES = (*(nn.Identity, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, *HOMOGENEOUS_MODULES),)


def standardize(filters: Tensor, eps: float = 1e-10) -> Tensor:
    """Return ``(W - mu) / sqrt(sigma^2 + eps)`` for every filter.

    Args:
        filters: ``(out, ...)``, one filter per row.
        eps: Added to the variance.

    Returns:
        The standardized filters, statistics computed in fp32 or wider.

    Examples:
        >>> import torch
        >>> standardize(torch.tensor([[1.0, 3.0, 5.0, 7.0]])).round(decimals=3)
        tensor([[-1.3420, -0.4470,  0.4470,  1.3420]])
    """
    rows = filters.movedim(1, -1) if is_channels_last(filters) else filters  # as they lie in memory
    found = F.layer_norm(rows.to(statistics_dtype(rows.dtype)), rows.shape[1:], eps=eps).to(filters.dtype)
    return found if rows is filters else found.movedim(-1, 1)


def scaled_standardize(filters: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """Return ``gain (W - mu) / sqrt(max(N sigma^2, eps))`` for every filter: its output has the variance of its input.

    Scaled weight standardization (arXiv 2101.08692, 2102.06171).

    Args:
        filters: ``(out, ...)``, one filter per row.
        gain: A number, or one per filter, ``(out,)``.
        eps: Smallest ``N sigma^2``.

    Returns:
        The standardized filters, statistics computed in fp32 or wider.

    Examples:
        >>> import torch
        >>> round(scaled_standardize(torch.tensor([[1.0, 3.0, 5.0, 7.0]])).square().sum().item(), 4)
        1.0
    """
    centred, variance = _centred(filters)
    scale = (variance * filters[0].numel()).clamp(min=eps).rsqrt()
    gain = gain.view(scale.shape) if isinstance(gain, Tensor) else gain
    return (centred * (scale * gain)).to(filters.dtype)


def _centred(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Filters minus their means, and their variances, ``(out, 1, ...)``."""
    wide, inner = filters.to(statistics_dtype(filters.dtype)), list(range(1, filters.ndim))
    centred = wide - wide.mean(inner, keepdim=True)
    return centred, centred.square().mean(inner, keepdim=True)  # on a CPU a fraction of the time of torch.var_mean


class FilterParametrization(nn.Module):
    """A parametrization of a convolution's weight that works on its filters, ``(out, ...)``.

    A subclass says in ``transform`` what becomes of them.

    Args:
        layer: The convolution; of a transposed one the weight is ``(in, out / groups, ...)``.
    """

    def __init__(self, layer: _ConvNd) -> None:
        super().__init__()
        self.transposed_groups = layer.groups if isinstance(layer, _ConvTransposeNd) else 0

    def transform(self, filters: Tensor) -> Tensor:
        """Return the filters that the convolution uses."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the convolution uses."""
        groups, transformed = self.transposed_groups, self.transform(self.filters(weight))
        return transformed.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if groups else transformed

    def filters(self, weight: Tensor) -> Tensor:
        """Return a weight with one filter per row."""
        groups = self.transposed_groups
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if groups else weight


class WeightStandardization(FilterParametrization):
    """``standardize`` as a parametrization (arXiv 1903.10520)."""

    def transform(self, filters: Tensor) -> Tensor:
        """Standardize the filters."""
        return standardize(filters)


def convolutions(model: nn.Module, method: str) -> dict[str, _ConvNd]:
    """Return the convolutions of a model by path.

    Args:
        model: Any module.
        method: Who asks, for messages.

    Raises:
        ValueError: A layer is lazy and not yet initialized.
    """
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, _ConvNd)}
    for path, layer in found.items():
        if any(is_lazy(parameter) for parameter in layer.parameters()):
            raise ValueError(
                f"{method}: {path or 'the model'} ({type(layer).__name__}) does not know its channels yet; run one batch "
                "through the model first"
            )
    return found


def obstacle(layer: _ConvNd) -> str | None:
    """Why the weight of a convolution cannot be standardized, or None."""
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters already"
    if not has_torch_forward(layer):
        return f"{type(layer).__name__} has a forward of its own"
    size = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if size <= 2:  # standardized they would be 0, or 1 and -1
        return f"its filters have {size} weight{'s' * (size > 1)}"
    if not layer.weight.is_floating_point():
        return f"its weights are {layer.weight.dtype}"
    return None


def parametrizable(model: nn.Module, method: str) -> list[tuple[str, _ConvNd]]:
    """Return the convolutions of a model whose weights can be standardized; those left out are logged.

    Args:
        model: Any module.
        method: Who asks, for messages.

    Returns:
        Paths and layers.

    Raises:
        ValueError: A layer is lazy and not yet initialized.
    """
    found = convolutions(model, method)
    left = {path: reason for path, layer in found.items() if (reason := obstacle(layer))}
    _name_those_left(left, method)
    if not found:
        _logger.warning("%s: the model has no convolution, so no weight is standardized", method)
    return [(path, layer) for path, layer in found.items() if path not in left]


def _name_those_left(left: Mapping[str, str], method: str) -> None:
    if left:
        named = ", ".join(f"{path or 'the model'} ({reason})" for path, reason in left.items())
        _logger.warning("%s: these convolutions keep their weights as they are: %s", method, named)


def parametrize_filters(layer: _ConvNd, parametrization: FilterParametrization) -> None:
    """Parametrize the weight of a convolution; state dicts of the plain layer still load."""
    if parametrize.is_parametrized(layer):  # torch adds to its class, which copies of the layer share
        _own_class(layer)
    parametrize.register_parametrization(layer, "weight", parametrization)
    _let_pickle(type(layer))
    layer.register_load_state_dict_pre_hook(_load_plain)
    vars(layer)["normkit_undo"] = unparametrize_filters


def _let_pickle(parametrized: Any) -> None:
    """Let layers of a class that torch made for parametrized ones be pickled, which torch refuses for lack of that class."""
    if "__getstate__" in vars(parametrized):  # that refuses
        del parametrized.__getstate__
    parametrized.__reduce_ex__ = _reduced


def _reduced(layer: Any, protocol: Any) -> Any:
    made, rest = type(layer), object.__reduce_ex__(layer, max(2, protocol))
    if "__reduce_ex__" not in vars(made):  # somebody, FSDP for one, derived a class from it
        return rest
    return _empty, (made.__bases__[0], *layer.parametrizations), *rest[2:]


def _empty(plain: type[nn.Module], *parametrized: str) -> nn.Module:
    """A layer without state, of a class like that of a layer with these parametrized tensors."""
    layer = plain.__new__(plain)
    parametrize._inject_new_class(layer)  # pyright: ignore[reportPrivateUsage]
    for name in parametrized:
        parametrize._inject_property(layer, name)  # pyright: ignore[reportPrivateUsage]
    _let_pickle(type(layer))
    return layer


def _own_class(layer: nn.Module) -> None:
    """Give a parametrized layer a class that it does not share with its copies."""
    shared: Any = type(layer)
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def unparametrize_filters(layer: nn.Module) -> None:
    """Give a convolution back its weight as the optimizer trains it."""
    _own_class(layer)  # from which torch takes the weight's property
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    bias = layer._parameters.pop("bias")  # the weight comes first again
    layer._parameters["bias"] = bias
    hooks = layer._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _load_plain]:
        del hooks[key]


def _load_plain(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a standardized convolution load the weight of a plain one; parameters that only it has stay as they are."""
    if prefix + "weight" not in state:
        return
    state[prefix + "parametrizations.weight.original"] = state.pop(prefix + "weight")
    for name, tensor in layer.parametrizations.weight.state_dict().items():
        state.setdefault(f"{prefix}parametrizations.weight.{name}", tensor)


def standardize_weights(model: nn.Module, flow: Dataflow | None = None) -> nn.Module:
    """Let the convolutions in front of group normalizations use standardized filters (arXiv 1903.10520).

    Standardized filters have lost their scale, and the normalization makes up for it. So what a convolution computes must
    reach group normalizations alone, directly or through sums, concatenations and operations that keep the scale (ReLU,
    pooling). The others keep their weights, as do frozen ones: heads, gates, what the trace did not reach.

    Args:
        model: Any module, changed in place.
        flow: Its data flow, when it is known already.

    Returns:
        The model.

    Raises:
        ValueError: A layer is lazy and not yet initialized.
    """
    method = "weight standardization"
    found = convolutions(model, method)
    left = reasons(model, found, flow)
    unsuited = {path: reason for path, reason in left.items() if obstacle(found[path]) or _constant(found[path])}
    _name_those_left(unsuited, method)
    if len(left) == len(found):
        why = "no convolution" if not found else "no convolution in front of a group normalization that could be used"
        _logger.warning("%s: the model has %s, so no weight is standardized", method, why)
    for path, layer in found.items():
        if path not in left:
            parametrize_filters(layer, WeightStandardization(layer))
    return model


def reasons(model: nn.Module, found: Mapping[str, _ConvNd], flow: Dataflow | None = None) -> dict[str, str]:
    """Return why convolutions are not to be standardized; those that are to be are absent.

    Args:
        model: A model.
        found: Its convolutions, or some of them, by path.
        flow: Its data flow, when it is known already.
    """
    flow, modules = dataflow(model) if flow is None else flow, dict(model.named_modules())
    left = {}
    for path, layer in found.items():
        reason = obstacle(layer) or _constant(layer)
        if reason is None and not layer.weight.requires_grad:
            reason = "it is frozen"
        if reason is None and not flow.calls(path):
            reason = "its surroundings cannot be traced; give batches="
        for call in flow.calls(path):
            reason = reason or _astray(flow, modules, call)
        if reason is not None:
            left[path] = reason
    return left


def _constant(layer: _ConvNd) -> str | None:
    """Filters of equal weights have no direction, and their first gradient would be 1e5 times that of others."""
    weight = layer.weight.detach()
    if weight.is_meta:
        return None
    rows = FilterParametrization(layer).filters(weight).flatten(1)
    return "it has filters of equal weights" if bool((rows.amax(1) == rows.amin(1)).any()) else None


def _astray(flow: Dataflow, modules: Mapping[str, nn.Module], index: int) -> str | None:
    """Where the output of step ``index`` arrives but in a group normalization; None where it arrives in these alone."""
    pending, seen, arrived = [index], {index}, False
    while pending:
        for consumer in flow.consumers(pending.pop()):
            step = flow.steps[consumer]
            module = modules.get(step.path or "") if step.name == "module" else None
            if isinstance(module, nn.GroupNorm):
                arrived = True
            elif step.name == "output":
                traced = "the part of the model that could be traced; give batches=" if flow.opaque else "the model"
                return f"no group normalization between it and the output of {traced}"
            elif not _keeps_scale(step, module):
                return f"no group normalization between it and {step.path or step.name}"
            elif consumer not in seen:
                seen.add(consumer)
                pending.append(consumer)
    return None if arrived else "its output is not used"


def _keeps_scale(step: Step, module: nn.Module | None) -> bool:
    by_a_number = step.name in ("mul", "truediv") and len(step.inputs) == 1
    return step.name in _KEEP_SCALE or by_a_number or type(module) in _KEEP_SCALE_MODULES


def effects(model: nn.Module) -> list[Effect]:
    """How many convolutions use standardized weights, if any does, and why the others do not."""
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, _ConvNd)}
    done = tuple(path for path, layer in found.items() if is_standardized(layer))
    if not done:
        return []
    rest = {path: layer for path, layer in found.items() if path not in done}
    left = dict.fromkeys(rest, "it keeps its weight") | reasons(model, rest)
    values = [count(found[path].parameters()) for path in done], [count(layer.parameters()) for layer in rest.values()]
    return [Effect("with standardized weights", "convolutions", done, left, (sum(values[0]), sum(map(sum, values))))]


def is_standardized(layer: nn.Module) -> bool:
    """Whether a layer uses weights that a parametrization of this package makes."""
    return "normkit_undo" in vars(layer) and any(isinstance(m, FilterParametrization) for m in layer.modules())
