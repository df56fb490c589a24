"""Fold normalization layers that are affine maps into the layers around them, for deployment.

In eval mode batch normalization is ``s x + t`` per channel. Behind a layer ``W x + b`` that is ``(s W) x + (s b + t)``,
before one it is ``(W s) x + (W t + b)``: the same function with one layer less.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.inspection.conformance import has_torch_forward
from normkit.inspection.forward import Forward, evaluating, run_batch
from normkit.inspection.graph import (
    Dataflow,
    dataflow,
    deciding_defaults,
    has_hooks,
    sole_consumer,
    source_of,
    works_on_positions,
)
from normkit.inspection.markers import is_attachment
from normkit.inspection.norms import PRODUCERS, NormTraits, is_frozen_norm, is_norm, is_placeholder, takes_maps
from normkit.inspection.reads import attributes_read, tensors_read
from normkit.inspection.record import record, tensors_in
from normkit.inspection.references import copy_detached, exchange, reached, unwritable
from normkit.methods.method import spatial_dims, to_batchnorm
from normkit.methods.revisited.revisit import FeatureScale
from normkit.surgery.affine import Affine, affine_of, fold_before, fold_behind


def fold(model: nn.Module, *, example: Any = None, forward: Forward = run_batch) -> nn.Module:
    """Return a copy of ``model`` in eval mode whose normalization layers are merged into their neighbours.

    Batch normalization (also Sync, frozen, Renorm, noisy), batchless, l_p, input and tracking instance normalization
    are folded into the linear, convolutional or transposed layer whose output they alone take, or else into the linear
    or unpadded convolutional layer that alone takes theirs; ``torch.nn.Identity`` stands in their place. Before a
    zero-padded convolution an input normalization becomes padding with the mean, so that the border is exact too. What
    stays is named in a warning, with the reason; where torch's batch normalization computes the same, it stands there. Hooks
    of this package are not in the copy. The copy computes the same for calls that take the same path through the model: its
    present attributes, the defaults of ``forward`` or the way in which ``example`` is run.

    Args:
        model: Any module; not changed. Of one wrapped in DistributedDataParallel, the module inside is folded.
        example: One batch. With it the model is run instead of traced, so that nothing about the data flow of this call
            stays unknown, and the copy is checked against it.
        forward: How to run the model on ``example``; by default a mapping goes in as keyword arguments, of a tuple or
            list the first entry, anything else as it is.

    Returns:
        The copy.

    Raises:
        ValueError: ``model`` is no module.
        RuntimeError: On ``example``, the copy computes something else.

    Examples:
        >>> fold(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fold: model is {str(model)[:60]!r}, of type {type(model).__name__}; give an nn.Module")
    model = model.module if isinstance(model, DistributedDataParallel) else model
    folded = _bare_copy(model).eval()
    flow = dataflow(folded) if example is None else record(folded, example, forward=forward)[0]
    modules = dict(folded.named_modules())
    reasons = {path: "" for path, module in modules.items() if _is_candidate(module)}
    fixed = _fixed(model, folded, flow, [modules[path] for path in reasons])
    swaps: dict[nn.Module, nn.Module] = {}
    progress = True
    while progress:  # a folded layer makes neighbours of the layers around it
        progress = False
        for path in list(reasons):
            source, consumer = source_of(flow, modules, path), sole_consumer(flow, modules, path)
            if consumer is not None and source_of(flow, modules, consumer) != path:
                consumer = None
            around = {side: near for side, near in (("before", source), ("behind", consumer)) if near is not None}
            apart = {near: hooked for near in around.values() if (hooked := _hooks_between(path, near, modules))}
            across = [near for near in around.values() if works_on_positions(flow, modules, near)]
            outcome = _try(
                modules[path],
                {side: modules[near] for side, near in around.items()},
                fixed | {modules[near]: f"{hooked} between them has hooks" for near, hooked in apart.items()},
                [modules[near] for near in across],
            )
            if isinstance(outcome, str):
                reasons[path] = outcome
                continue
            del reasons[path]
            swaps[modules[path]] = outcome
            modules[path], progress = outcome, True
    for path in [path for path in reasons if modules[path] not in fixed]:
        plain = _torch_layer(path, modules[path], folded)
        if plain is not None:
            swaps[modules[path]] = modules[path] = plain
    folded = exchange(folded, swaps)
    if example is None and (decided := deciding_defaults(folded)):
        warnings.warn(
            f"fold: another value of {', '.join(decided)} takes another path through the model; the copy is for this one",
            stacklevel=2,
        )
    if reasons:
        left = "1 layer stays" if len(reasons) == 1 else f"{len(reasons)} layers stay"
        warnings.warn(f"fold: {left}. {_grouped(reasons, modules)}", stacklevel=2)
    if example is not None:
        with evaluating(model), evaluating(folded):
            _check_same(forward(model, example), forward(folded, example))
    return folded


def _hooks_between(path: str, other: str, modules: Mapping[str, nn.Module]) -> str | None:
    """A container with hooks that holds one of two modules and not the other."""
    apart = set(_containers(path)) ^ set(_containers(other))
    return next((container for container in sorted(apart) if has_hooks(modules[container])), None)


def _containers(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _grouped(reasons: dict[str, str], modules: dict[str, nn.Module]) -> str:
    """One sentence per reason, with the layers it holds for."""
    layers: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        layers.setdefault(reason, []).append(f"{path or 'the model'} ({type(modules[path]).__name__})")
    return " ".join(f"{', '.join(names)}: {reason}." for reason, names in layers.items())


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, NormTraits) or is_norm(module) or is_frozen_norm(module)


def _fixed(model: nn.Module, folded: nn.Module, flow: Dataflow, candidates: list[nn.Module]) -> dict[nn.Module, str]:
    """Layers of the copy that must stay as they are, with the reason."""
    shared = reached(folded, model.modules())
    fixed = {
        folded.get_submodule(path): "a function of the model refers to it, which a copy of the model shares"
        for path, module in model.named_modules()
        if module in shared and module is not model
    }
    stuck = unwritable(folded, {norm: nn.Identity() for norm in candidates})
    return {
        **attributes_read(folded),
        **tensors_read(folded, flow),
        **dict.fromkeys(stuck, "a container that may not be written to refers to it"),
        **fixed,
    }


def _try(
    norm: nn.Module, around: Mapping[str, nn.Module], fixed: Mapping[nn.Module, str], across: Collection[nn.Module]
) -> nn.Module | str:
    """Fold ``norm`` into one of its neighbours; what stands in its place, or why that cannot be.

    Args:
        norm: The layer.
        around: Its neighbours "before" and "behind" it.
        fixed: Layers that must stay as they are, with the reason.
        across: Neighbours that work on positions, not on channels.
    """
    if norm in fixed:
        return fixed[norm]
    if is_placeholder(norm) and norm.bias is None:
        return nn.Identity()
    affine = affine_of(norm)
    if isinstance(affine, str):
        return affine
    if has_hooks(norm):
        return "it has hooks"
    reasons = []
    for side, layer in around.items():
        if not isinstance(layer, PRODUCERS):
            continue
        if affine.channel_dim != -1 and (layer in across or (isinstance(layer, nn.Linear) and takes_maps(norm))):
            reasons.append(f"the Linear {side} it works on the last dimension, which is not that of its channels")
            continue
        merge = fold_behind if side == "before" else fold_before
        outcome = _obstacle(layer, side, fixed.get(layer, "")) or merge(_plain(layer), affine)
        if isinstance(outcome, nn.Module):
            return outcome
        reasons.append(outcome)
    return ", and ".join(reasons) or "no linear or convolutional layer is its only neighbour on either side"


def _obstacle(layer: nn.Module, side: str, fixed: str) -> str:
    name = f"the {type(layer).__name__} {side} it"
    if fixed:
        return f"{name} must stay as it is: {fixed}"
    if has_hooks(layer):
        return f"{name} has hooks"
    if not has_torch_forward(layer):
        return f"{name} has a forward of its own"
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        return f"{name} has not seen its first batch"
    return ""


def _plain(layer: Any) -> Any:
    """``layer`` with its tensors as they come out of its parametrizations.

    torch's own removal would take the parametrized properties off the class that the copy shares with the model.
    """
    if parametrize.is_parametrized(layer):
        tensors = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer._modules["parametrizations"]
        for name, tensor in tensors.items():
            layer.register_parameter(name, nn.Parameter(tensor))
    return layer


def _torch_layer(path: str, norm: nn.Module, model: nn.Module) -> nn.Module | None:
    """The batch normalization of torch that computes what a layer of this package does in eval mode, if there is one."""
    affine = affine_of(norm)
    if not isinstance(norm, NormTraits) or isinstance(affine, str) or is_placeholder(norm) or has_hooks(norm):
        return None
    if affine.channel_dim != 1:
        return None
    try:
        plain = to_batchnorm(norm, lambda: spatial_dims(path, norm, None, model))
    except ValueError:  # the dimensions of its input cannot be told
        return None
    same = affine_of(plain)
    equal = isinstance(same, Affine) and all(
        torch.allclose(a, b, rtol=1e-6) for a, b in ((same.scale, affine.scale), (same.shift, affine.shift))
    )
    return plain if equal else None


def _bare_copy(model: nn.Module) -> nn.Module:
    """A copy without what this package has attached to the model: observers, and memories of replaced layers."""
    tables = [table for m in model.modules() for name, table in vars(m).items() if name.endswith("_hooks") and table]
    saved = [(table, dict(table)) for table in tables if isinstance(table, dict)]
    try:
        for table, hooks in saved:
            for key in [key for key, hook in hooks.items() if is_attachment(hook)]:
                del table[key]
        bare = copy_detached(model)
    finally:
        for table, hooks in saved:
            table.clear()
            table.update(hooks)
    for module in list(bare.modules()):
        vars(module).pop("normkit_origin", None)
        if vars(module).pop("normkit_undo", None) is not None:  # its weight is a parametrization of this package's
            _plain(module)
        _take_feature_scale(module)
    return bare


@torch.no_grad()
def _take_feature_scale(layer: nn.Module) -> None:
    """Let a linear layer's weight carry the factor that a revisited model multiplies the layer's input by."""
    scales = {key: hook for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, FeatureScale)}
    if scales and isinstance(layer, nn.Linear) and has_torch_forward(layer):
        _plain(layer)
        for key, scale in scales.items():
            layer.weight.mul_(scale.factor)
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _check_same(expected: Any, actual: Any) -> None:
    for a, b in zip(tensors_in(expected), tensors_in(actual), strict=True):
        if not a.is_floating_point():
            continue
        error = (a - b).abs().max().item() / max(1.0, a.abs().max().item())
        if not error < max(1e-4, 50 * torch.finfo(a.dtype).eps):
            raise RuntimeError(
                f"fold: the folded model differs from the model by {error:.1e} on the example; a layer normalises another "
                "dimension than it seems, or its forward depends on more than its input"
            )
