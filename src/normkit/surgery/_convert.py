"""Replace normalization layers in any model, and put them back.

Every replacement is planned first and carried out last, so that a model is as it was when something raises. A replaced
layer lends its parameters, hooks and buffers to the layer that stands in for it: tied parameters stay tied, an
optimizer goes on, handles still remove their hooks, and state dicts of the one form load into the other where that
has a meaning.
"""

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normkit._errors import closest
from normkit.inspection.conformance import applies_children, computes_as_its_type, has_torch_forward
from normkit.inspection.graph import dataflow, has_one_position, producers
from normkit.inspection.norms import PRODUCERS, Producer, is_frozen_norm, is_norm, outputs, statistics_of
from normkit.inspection.reads import attributes_read
from normkit.inspection.references import exchange, unwritable
from normkit.methods.baselines import Removed
from normkit.methods.catalog import TARGETS
from normkit.methods.method import spatial_dims, to_batchnorm
from normkit.optim.param_groups import check_optimizer, regroup
from normkit.surgery.affine import Affine, affine_of
from normkit.surgery.conversion_state import (
    Origin,
    default_bias,
    load_other_form,
    origin_of,
    reference,
    restored,
    take_children,
    transfer_hooks,
)

_logger = logging.getLogger("normkit")

_LITTLE = 4
"""Values that a group normalization must have together; two become plus and minus one, whatever they are."""
_TORCH_INSTANCE = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _InstanceNorm)

Where = Callable[[str, nn.Module], bool] | Iterable[str] | None


@dataclass(frozen=True)
class _Swap:
    """One replacement: ``old`` by ``new``; what ``old`` was converted from takes the tensors of ``restored`` first."""

    old: nn.Module
    new: nn.Module
    restored: nn.Module | None = None


def convert(
    model: nn.Module, to: str, *, where: Where = None, optimizer: Optimizer | None = None, **settings: Any
) -> nn.Module:
    """Replace the normalization layers of ``model`` by those of another method.

    Targets: ``group`` (GroupNorm, see ``normkit.methods.baselines.group_count``), ``layer`` (GroupNorm with one group:
    LayerNorm over channels and space), ``instance`` (GroupNorm with a group per channel), ``none`` (removed; the layer before
    gets its bias back, or a ``normkit.methods.baselines.Removed`` with one stands in), ``batch``, ``frozen``, ``online``,
    ``filter-response``, ``batch-renorm``, ``batchless``, ``batchless-projected``, ``l1``, ``l2``, ``linf``, ``noisy-batch``. A
    layer that was converted before is treated
    as if it were reverted first. LayerNorm and RMSNorm, which normalize the last dimensions, are left as they are
    unless the target can do so too. In a model with batch normalization they stay unless ``where`` chooses them, and
    ``none`` then removes batch normalization only.

    A layer is replaced wherever the model refers to it: attributes, containers, other objects, partials, bound methods. A
    layer stays, and a warning names it, if an object that cannot be changed refers to it, or if another module reads its
    attributes instead of calling it (torch's fast path of transformer encoders, layers fused for quantization).

    Args:
        model: Any module, changed in place.
        to: The target.
        where: Which layers: a predicate ``(path, layer) -> bool``, or paths of layers or of modules that hold them.
        optimizer: An optimizer over the model's parameters, repaired when parameters come or go.
        settings: Arguments of the new layers, where the target is one of this package's.

    Returns:
        The model; the returned one counts when the model itself is a normalization layer.

    Raises:
        ValueError: The target, or a path in ``where``, is unknown; the target has no settings; the model is wrapped
            in DistributedDataParallel, sharded or scripted; a layer is lazy and not yet initialized, or of a subclass that
            computes something else; the optimizer holds no parameter of the model.

    Examples:
        >>> convert(nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)), "none")
        Sequential(
          (0): Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1))
          (1): Removed()
        )
    """
    if to not in TARGETS:
        raise ValueError(f"convert: unknown target {to!r}; choose one of {', '.join(TARGETS)}")
    if settings and not TARGETS[to].configurable:
        raise ValueError(f"convert: target {to!r} has no settings, got {', '.join(settings)}")
    _check(model, optimizer)
    layers = select(model, where)
    if where is None:
        _leave_others(layers, to)
    if not layers:
        if to != "none" or where is not None:  # a model without normalization layers is what that asks for
            warnings.warn(f"convert: no normalization layer to convert to {to!r}; the model is unchanged", stacklevel=2)
        return model
    _leave_read(model, layers)
    flow, modules = dataflow(model), dict(model.named_modules())
    sources = producers(model, flow)
    plans = []
    for path, layer in layers.items():
        source, single = modules.get(sources.get(path, path)), has_one_position(flow, modules, path)
        plans.append(_plan(model, path, layer, source if isinstance(source, PRODUCERS) else None, to, settings, single))
    swaps = [swap for swap in plans if swap is not None]
    if layers and not swaps and not any(origin_of(layer) or TARGETS[to].is_native(layer) for layer in layers.values()):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
        warnings.warn(f"convert: {kinds} cannot become {to!r}; the model is unchanged", stacklevel=2)
    return _carry_out(model, swaps, optimizer)


def revert(model: nn.Module, *, where: Where = None, optimizer: Optimizer | None = None) -> nn.Module:
    """Put back every layer that [`normkit.convert`][] replaced, with the parameters and statistics it has by now.

    Right after a conversion that is the identity. Statistics of layers that keep other ones than batch
    normalization are translated so that eval stays the same function; a bias given in exchange for a removed layer
    goes into the running mean. Where the stand-in kept no statistics the old ones return:
    [`normkit.recalibrate`][] brings them up to date. Convolutions whose weights a method standardizes use them as they
    are again.

    Args:
        model: A converted model, changed in place.
        where: Which layers, as in [`normkit.convert`][].
        optimizer: As in [`normkit.convert`][].

    Returns:
        The model; the returned one counts when the model itself is a normalization layer.

    Raises:
        ValueError: As in [`normkit.convert`][].
    """
    _check(model, optimizer)
    changed = select(model, where, _is_changed).values()
    converted = [(layer, origin) for layer in changed if (origin := origin_of(layer))]
    swaps = [_Swap(layer, o.module, restored(layer, o, reference(layer, model))) for layer, o in converted]
    return _carry_out(model, swaps, optimizer, [layer for layer in changed if origin_of(layer) is None])


def _check(model: nn.Module, optimizer: Optimizer | None) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {str(model)[:60]!r}, of type {type(model).__name__}; give an nn.Module")
    for path, module in model.named_modules():
        where = path or "the model"
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{where} is wrapped in DistributedDataParallel, which has registered the parameters of the layers to "
                "replace; convert the bare model first, then wrap it (wrapped.module is the bare model)"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is a scripted module, whose layers are fixed; convert the model before scripting it"
            )
        if any(hasattr(parameter, "placements") for parameter in module._parameters.values()):
            raise ValueError(
                f"{where} is sharded (fully_shard), which has noted the layers to replace; convert the model before "
                "sharding it"
            )
    if optimizer is not None:
        check_optimizer(optimizer, model)


def _is_replaceable(layer: nn.Module) -> bool:
    """Whether ``layer`` is a normalization layer or stands in for one."""
    return is_norm(layer) or is_frozen_norm(layer) or origin_of(layer) is not None


def _is_changed(layer: nn.Module) -> bool:
    """Whether ``layer`` stands in for another, or a method has changed it in place and noted how to undo that."""
    return origin_of(layer) is not None or "normkit_undo" in vars(layer)


def undo_in_place(layers: Iterable[nn.Module]) -> None:
    """Undo what methods have changed in layers that stayed: standardized weights."""
    for layer in list(layers):
        if "normkit_undo" in vars(layer):
            vars(layer).pop("normkit_undo")(layer)


def select(
    model: nn.Module, where: Where, candidate: Callable[[nn.Module], bool] = _is_replaceable
) -> dict[str, nn.Module]:
    """The candidates that ``where`` chooses; each once, by its first path.

    Raises:
        ValueError: The model has no module at a path.
    """
    layers = {path: m for path, m in model.named_modules() if candidate(m)}
    if where is None:
        return layers
    if isinstance(where, type | nn.Module) or not (callable(where) or isinstance(where, Iterable)):
        raise ValueError(f"where is {str(where)[:60]!r}; give paths, or a predicate such as lambda path, layer: ...")
    if callable(where):
        return {path: layer for path, layer in layers.items() if where(path, layer)}
    everywhere = dict(model.named_modules(remove_duplicate=False))
    chosen: set[nn.Module] = set()
    for path in [where] if isinstance(where, str) else where:
        if not isinstance(path, str):
            raise ValueError(f"where holds a {type(path).__name__}; give paths, which are strings")
        if path not in everywhere:
            near = closest(path, everywhere)
            raise ValueError(f"where: the model has no module {path!r}" + (f"; did you mean {near!r}?" if near else ""))
        chosen.update(everywhere[path].modules())
    return {path: layer for path, layer in layers.items() if layer in chosen}


def _plan(
    model: nn.Module,
    path: str,
    layer: nn.Module,
    producer: Producer | None,
    to: str,
    settings: dict[str, Any],
    single: bool | None,
) -> _Swap | None:
    """The swap that turns ``layer`` into the target, or None where it is one already or cannot be.

    Raises:
        ValueError: The layer computes something else than its type; or it, or the one before it whose bias is changed,
            is lazy and not yet initialized.
    """
    origin, target = origin_of(layer), TARGETS[to]
    if origin is not None and (origin.to, origin.settings) == (to, settings):
        return None
    if origin is None and target.is_native(layer) and not settings:
        return None
    was = None if origin is None else restored(layer, origin, reference(layer, model))
    if origin is not None and target.is_native(origin.module) and not settings:
        return _Swap(layer, origin.module, was)
    base = source = layer if was is None else was
    if is_frozen_norm(base) and isinstance(affine_of(base), Affine):
        source = to_batchnorm(base, lambda: spatial_dims(path, base, producer, model))
    if any(is_lazy(tensor) for tensor in (*source.parameters(), *source.buffers())):
        raise ValueError(
            f"{path}: {type(source).__name__} does not know its features yet; run one batch through the model first"
        )
    if isinstance(source, (nn.LayerNorm, nn.RMSNorm)) and not target.channels_last:
        return None
    several = isinstance(source, nn.LayerNorm) and len(source.normalized_shape) > 1
    if (several or isinstance(source, nn.RMSNorm)) and to != "none":
        return None
    computed = next((name for name in ("weight", "bias") if _is_computed(source, name)), None)
    if computed is not None:
        raise ValueError(
            f"{path}: the {computed} of this {type(source).__name__} is computed from other tensors (parametrization, pruning), "
            "which would be lost; remove that first, or leave the layer out with `where`"
        )
    with_children = applies_children(source)
    if is_frozen_norm(source) or not (with_children or computes_as_its_type(source)):
        raise ValueError(
            f"{path}: {type(source).__name__} computes something else than torch's layer that it derives from (an activation "
            "after it, other dimensions, more arguments), which would be lost; leave it out with `where`, or make that a "
            "module of its own"
        )
    biased = frozen = None
    if to == "none" and producer is not None and has_torch_forward(producer):
        new, biased = Removed(), producer if producer.bias is None else None
    else:
        new = target.build(source, lambda: spatial_dims(path, source, producer, model), **settings)
    together = new.num_channels // new.num_groups if isinstance(new, nn.GroupNorm) else _LITTLE
    if together < _LITTLE and (_is_flat(source, producer, model) if single is None else single):
        _logger.warning(
            "convert: %s (%s) normalizes flat features or single positions, of which %r would leave %s",
            path,
            type(source).__name__,
            to,
            "nothing: it stays as it is" if together == 1 else f"little, since it normalizes {together} at a time",
        )
        if together == 1:
            return None
    constant = producer is not None and computes_as_its_type(producer)
    if target.freezes_bias and constant and producer is not None and producer.bias is not None:
        trained = producer.bias.requires_grad or (origin is not None and origin.frozen is producer)
        frozen = producer if trained else None
    changed = biased if frozen is None else frozen
    if changed is not None and any(is_lazy(p) for p in changed.parameters()):
        raise ValueError(
            f"{path}: the {type(changed).__name__} before it does not know its features yet; run one batch through the "
            "model first"
        )
    transfer_hooks(base, new)
    like = reference(base, model)
    if like is not None and not any(True for _ in (*base.parameters(), *base.buffers())):
        new.to(like.device, like.dtype)  # it had no tensor to tell them
    if any(True for _ in base.parameters()) and not any(p.requires_grad for p in base.parameters()):
        new.requires_grad_(False)  # parameters that it has in addition are frozen, too
    module = layer if origin is None else origin.module
    vars(new)["normkit_origin"] = Origin(module, to, settings, biased, frozen, None if like is None else like.dtype)
    if with_children:
        vars(new)["normkit_origin"]._child_hook = take_children(source, new)
    new.register_load_state_dict_pre_hook(load_other_form)
    return _Swap(layer, new, was)


def _is_computed(norm: nn.Module, name: str) -> bool:
    """Whether a tensor of ``norm`` is neither a parameter nor a buffer."""
    return not (name in norm._parameters or name in norm._buffers) and isinstance(getattr(norm, name, None), Tensor)


def _is_flat(norm: nn.Module, producer: Producer | None, model: nn.Module) -> bool:
    """Whether ``norm`` sees one value per channel and sample, as far as can be told."""
    if producer is not None:
        return isinstance(producer, nn.Linear)
    sequences = any(isinstance(m, nn.Conv1d | nn.ConvTranspose1d) for m in model.modules())
    return isinstance(norm, nn.BatchNorm1d) and not sequences


def _carry_out(
    model: nn.Module, swaps: list[_Swap], optimizer: Optimizer | None, undone: Iterable[nn.Module] = ()
) -> nn.Module:
    swaps = _writable(model, swaps)
    before = dict(model.named_parameters())
    undo_in_place(undone)
    for swap in swaps:
        _swap_biases(swap, reference(swap.old, model))
    model = exchange(model, {swap.old: swap.new for swap in swaps})
    if optimizer is not None:
        regroup(optimizer, before, dict(model.named_parameters()))
    return model


def _leave_others(layers: dict[str, nn.Module], to: str) -> None:
    """Take layer normalization out of ``layers`` where there is batch normalization; and all other kinds if it is removed."""
    sources = {path: layer if (origin := origin_of(layer)) is None else origin.module for path, layer in layers.items()}
    if not any(
        statistics_of(source) not in ("instance", "none") or is_frozen_norm(source) for source in sources.values()
    ):
        return
    kinds = _TORCH_INSTANCE if to == "none" else (nn.LayerNorm, nn.RMSNorm)
    others = [path for path, source in sources.items() if isinstance(source, kinds)]
    for path in others:
        del layers[path]
    if others:
        _logger.info(
            "convert: %s stay as they are, since the model has batch normalization; choose them with `where` to convert them",
            ", ".join(others),
        )


def _leave_read(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Take out of ``layers`` those whose attributes are read by others, which would not see the layer that replaces them."""
    readers = attributes_read(model)
    left = {path: reason for path, layer in layers.items() if (reason := readers.get(layer))}
    for path in left:
        del layers[path]
    if left:
        shown = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:5])
        more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
        _logger.warning("convert: %d normalization layers stay as they are. %s%s", len(left), shown, more)


def _writable(model: nn.Module, swaps: list[_Swap]) -> list[_Swap]:
    """The swaps without those of layers to which something refers that cannot be written; these are named."""
    stuck = unwritable(model, {swap.old: swap.new for swap in swaps})
    if stuck:
        names = ", ".join(path or "the model" for path, module in model.named_modules() if module in stuck)
        warnings.warn(
            f"{names}: stays as it is, since a container that may not be written to refers to it; let the container look the "
            "layer up instead",
            stacklevel=4,
        )
    return [swap for swap in swaps if swap.old not in stuck]


def _swap_biases(swap: _Swap, like: Tensor | None) -> None:
    """Bring the replaced layer up to date, and take and give the biases of the layers before."""
    origin, future = origin_of(swap.old), origin_of(swap.new)
    if origin is not None and swap.restored is not None:
        vars(origin.module).update(vars(swap.restored))
        if like is not None:
            origin.module.to(device=like.device)
        if origin.biased is not None:
            origin.biased.register_parameter("bias", None)
        if origin.frozen is not None and origin.frozen.bias is not None:
            origin.frozen.bias.requires_grad_(True)
        for hook in (origin._bias_hook, origin._child_hook):
            if hook is not None:
                hook.remove()
    if future is not None and future.frozen is not None and future.frozen.bias is not None:
        future.frozen.bias.requires_grad_(False)
    if future is not None and future.biased is not None:
        layer, beta = future.biased, getattr(future.module, "bias", None)
        features = outputs(layer)
        trainable = layer.weight.requires_grad if beta is None else beta.requires_grad
        layer.bias = nn.Parameter(layer.weight.new_zeros(features), requires_grad=trainable)
        future._bias_hook = layer.register_load_state_dict_pre_hook(default_bias)
