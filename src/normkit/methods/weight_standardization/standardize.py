"""Convolution filters standardized in the forward pass, as a parametrization of the weight.

Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, Siyuan Qiao, Huiyu Wang, Chenxi Liu, Wei
Shen, Alan Yuille, arXiv 1903.10520. For the filter W of an output channel, with mean mu and variance sigma^2 of its N weights
(input channels of its group times kernel positions), the convolution uses

    (W - mu) / sqrt(sigma^2 + eps)

The optimizer trains W. The layer keeps its class, its parameters, its hooks and its place; state dicts of the plain model load.
"""

import logging
import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.inspection.conformance import has_torch_forward
from normkit.moments import is_channels_last, statistics_dtype

_logger = logging.getLogger("normkit")


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
        groups = self.transposed_groups
        if not groups:
            return self.transform(weight)
        filters = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return self.transform(filters).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


class WeightStandardization(FilterParametrization):
    """``standardize`` as a parametrization (arXiv 1903.10520)."""

    def transform(self, filters: Tensor) -> Tensor:
        """Standardize the filters."""
        return standardize(filters)


def parametrizable(model: nn.Module, method: str) -> list[tuple[str, _ConvNd]]:
    """Return the convolutions of a model whose weights can be standardized; those left out are logged.

    Left out are filters of one weight, which would become zero, layers with a forward of their own, and weights that
    are parametrized already.

    Args:
        model: Any module.
        method: Who asks, for messages.

    Returns:
        Paths and layers.

    Raises:
        ValueError: A layer is lazy and not yet initialized.
    """
    chosen, left = [], []
    for path, layer in model.named_modules():
        if not isinstance(layer, _ConvNd):
            continue
        if any(is_lazy(parameter) for parameter in layer.parameters()):
            raise ValueError(
                f"{method}: {path or 'the model'} ({type(layer).__name__}) does not know its channels yet; run one batch "
                "through the model first"
            )
        if "weight" not in layer._parameters:
            left.append(f"{path} (its weight is computed from other parameters already)")
        elif not has_torch_forward(layer):
            left.append(f"{path} ({type(layer).__name__} has a forward of its own)")
        elif layer.in_channels // layer.groups * math.prod(layer.kernel_size) == 1:
            left.append(f"{path} (its filters have one weight)")
        else:
            chosen.append((path, layer))
    if left:
        _logger.warning("%s: these convolutions keep their weights as they are: %s", method, ", ".join(left))
    elif not chosen:
        _logger.warning("%s: the model has no convolution, so no weight is standardized", method)
    return chosen


def parametrize_filters(layer: _ConvNd, parametrization: FilterParametrization) -> None:
    """Parametrize the weight of a convolution; state dicts of the plain layer still load."""
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


def unparametrize_filters(layer: nn.Module) -> None:
    """Give a convolution back its weight as the optimizer trains it."""
    shared: Any = type(layer)  # with copies of the layer, and torch takes the weight's property off the class
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
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


def standardize_weights(model: nn.Module) -> nn.Module:
    """Let every convolution of a model use standardized filters (arXiv 1903.10520).

    Meant for convolutions in front of a normalization, such as GroupNorm, which makes up for the filters' lost scale.

    Args:
        model: Any module, changed in place.

    Returns:
        The model.
    """
    for _, layer in parametrizable(model, "weight standardization"):
        parametrize_filters(layer, WeightStandardization(layer))
    return model
