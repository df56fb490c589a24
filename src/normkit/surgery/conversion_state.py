"""Keep the origin of converted layers, for revert and for loading state dicts of the original."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normkit.inspection.markers import attachment
from normkit.inspection.norms import Producer, is_frozen_norm, is_placeholder, running_tensors
from normkit.methods.catalog import TARGETS
from normkit.methods.method import spatial_dims, to_batchnorm
from normkit.methods.revisited.revisit import revision_of, tag

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


@dataclass
class Origin:
    """The layer that a converted layer replaced.

    Attributes:
        module: The replaced layer.
        to: The target it was converted to.
        settings: Settings of the layer that stands in for it.
        biased: The layer before it that got a bias in exchange, if one did.
        frozen: The layer before it whose bias is not trained any more, if one's was.
        dtype: Of the layer, or else of the model, at the conversion.
    """

    module: nn.Module
    to: str
    settings: dict[str, Any] = field(default_factory=dict)
    biased: Producer | None = None
    frozen: Producer | None = None
    dtype: torch.dtype | None = None
    _bias_hook: RemovableHandle | None = None
    _child_hook: RemovableHandle | None = None


def origin_of(module: nn.Module) -> Origin | None:
    """Return the layer that ``module`` was converted from, or None."""
    return vars(module).get("normkit_origin")


def transfer_hooks(source: nn.Module, new: nn.Module) -> None:
    """Copy hooks, training flag and marks of ``source`` to ``new``."""
    tag(new, revision_of(source))
    for name in _HOOKS:
        vars(new)[name] = vars(source)[name]
    new.train(source.training)


def take_children(source: nn.Module, new: nn.Module) -> RemovableHandle:
    """Let ``new`` apply the children of ``source`` to its output, as ``source`` does."""
    for name, child in source.named_children():
        new.add_module(name, child)
    return new.register_forward_hook(_apply_children, prepend=True)


def _apply_children(layer: nn.Module, args: Any, output: Any) -> Any:
    for child in layer.children():
        output = child(output)
    return output


def reference(layer: nn.Module, model: nn.Module) -> Tensor | None:
    """Return a parameter with the device and dtype of ``layer``: its own, else one of the model."""
    return next((p for p in (*layer.parameters(recurse=False), *model.parameters()) if p.is_floating_point()), None)


def restored(layer: nn.Module, origin: Origin, like: Tensor | None) -> nn.Module:
    """Return a copy of the layer that ``layer`` replaced, with the tensors it would have now.

    Args:
        layer: The layer.
        origin: What it was converted from.
        like: See :func:`reference`.
    """
    module = _twin(origin.module)
    parameters, buffers = module._parameters, module._buffers
    if not is_placeholder(layer):
        parameters.update({name: p for name, p in layer._parameters.items() if name in ("weight", "bias")})
    now = {**layer._buffers, **running_tensors(layer)}
    if is_frozen_norm(origin.module):  # its scale and shift are buffers
        now |= {name: p.detach() for name in ("weight", "bias") if (p := parameters.pop(name, None)) is not None}
    buffers.update({name: now[name] for name, buffer in buffers.items() if buffer is not None and name in now})
    for name, old in origin.module._buffers.items():
        if old is not None and (new := buffers[name]) is not None:
            # what was set aside did not follow a cast, and layers of this package keep statistics in fp32 or wider
            follows = old.dtype == origin.dtype
            buffers[name] = new.to(like.dtype if like is not None and follows else old.dtype)
    biased: Any = layer if origin.biased is None else origin.biased
    bias = biased.bias if is_placeholder(layer) else None
    mean = buffers.get("running_mean")
    if mean is not None and bias is not None:
        buffers["running_mean"] = mean.to(bias.device) - bias.detach().to(mean.dtype)
    return module.train(layer.training)


def _rebuilt(source: nn.Module, layer: nn.Module, origin: Origin) -> nn.Module:
    """What the conversion that made ``layer`` makes of ``source``."""
    if is_frozen_norm(source):
        source = to_batchnorm(source, lambda: 2)  # only its tensors count
    new = TARGETS[origin.to].build(source, lambda: spatial_dims("", layer, None, layer), **origin.settings)
    transfer_hooks(source, new)
    return new


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy whose tensors can be exchanged without changing ``module``."""
    twin = copy.copy(module)
    vars(twin).update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    return twin


@attachment
def load_other_form(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a converted layer load a state dict of the layer it replaced, or of one that was its kind from the start."""
    origin = origin_of(layer)
    if origin is None:
        return
    given = {key[len(prefix) :] for key in state if key.startswith(prefix)}
    own, old = layer.state_dict(), set(origin.module.state_dict())
    uncounted = given == old - {"num_batches_tracked"} and not given < set(own)  # from before torch had the counter
    if (given == old or uncounted) and given != set(own):
        twin = _twin(origin.module)
        for tensors in (twin._parameters, twin._buffers):
            tensors.update({name: nn.Parameter(state[prefix + name], False) for name in tensors.keys() & given})
        for name in given:
            del state[prefix + name]
        fresh = _rebuilt(twin, layer, origin).state_dict()
        aside = {name: buffer.detach().clone() for name, buffer in twin._buffers.items() if buffer is not None}
        origin.module._buffers.update(aside)
        with torch.no_grad():
            for name, parameter in origin.module._parameters.items():
                if parameter is not None and name not in own:  # set aside as well
                    parameter.copy_(twin.get_parameter(name))
        state.update({prefix + name: fresh[name] for name in own})
    elif given and given < set(own):
        state.update({prefix + name: own[name] for name in dict(layer.named_buffers()).keys() & own.keys() - given})


@attachment
def default_bias(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add a bias of 0 where a state dict predates the removal of a normalization and has none."""
    weight: Tensor | None = state.get(prefix + "weight")
    if weight is not None and isinstance(layer.bias, Tensor):  # which may be on the meta device; the state is not
        state.setdefault(prefix + "bias", weight.new_zeros(layer.bias.shape))
