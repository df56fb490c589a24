"""Replace normalization layers in any model, and put them back.

Every replacement is planned first and carried out last, so that a model is as it was when something raises. A replaced
layer lends its parameters, hooks and buffers to the layer that stands in for it: tied parameters stay tied, an
optimizer goes on, handles still remove their hooks, and state dicts of the one form load into the other where that
has a meaning.
"""

import copy
import difflib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from evenkeel.graph import PRODUCERS, is_norm, producers
from evenkeel.methods.revisited import Revision, mark, revision_of
from evenkeel.regroup import check_optimizer, regroup
from evenkeel.targets import TARGETS, Removed, features_of, spatial_dims

Producer = nn.Linear | _ConvNd
Where = Callable[[str, nn.Module], bool] | Iterable[str] | None

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
    """What stood where a converted layer stands now.

    Attributes:
        module: The replaced layer.
        to: The target it was converted to.
        settings: Settings of the layer that stands in for it.
        biased: The layer before it that got a bias in exchange, if one did.
    """

    module: nn.Module
    to: str
    settings: dict[str, Any] = field(default_factory=dict)
    biased: Producer | None = None
    _bias_hook: RemovableHandle | None = None


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

    Targets: ``group`` (GroupNorm, see :func:`evenkeel.targets.group_count`), ``layer`` (GroupNorm with one group:
    LayerNorm over channels and space), ``none`` (removed; the layer before gets its bias back, or a
    :class:`evenkeel.targets.Removed` with one stands in), ``batch``, ``batch-renorm``, ``batchless``,
    ``batchless-projected``, ``l1``, ``l2``, ``linf``, ``noisy-batch``. A layer that was converted before is treated
    as if it were reverted first. LayerNorm and RMSNorm, which normalise the last dimensions, are left as they are
    unless the target can do so too.

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
            in DistributedDataParallel or scripted; a layer is lazy and not yet initialised; the optimizer holds no
            parameter of the model.

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
    layers = _select(model, where)
    if not layers:
        warnings.warn(f"convert: no normalization layer to convert to {to!r}; the model is unchanged", stacklevel=2)
        return model
    fed_by = feeding(model)
    swaps = [_plan(model, path, layer, fed_by.get(layer), to, settings) for path, layer in layers.items()]
    return _carry_out(model, [swap for swap in swaps if swap is not None], optimizer)


def revert(model: nn.Module, *, where: Where = None, optimizer: Optimizer | None = None) -> nn.Module:
    """Put back every layer that :func:`convert` replaced, with the parameters and statistics it has by now.

    Right after a conversion that is the identity. Statistics of layers that keep other ones than batch
    normalization are translated so that eval stays the same function; a bias given in exchange for a removed layer
    goes into the running mean. Where the stand-in kept no statistics the old ones return:
    :func:`evenkeel.recalibrate` brings them up to date.

    Args:
        model: A converted model, changed in place.
        where: Which layers, as in :func:`convert`.
        optimizer: As in :func:`convert`.

    Returns:
        The model; the returned one counts when the model itself is a normalization layer.

    Raises:
        ValueError: As in :func:`convert`.
    """
    _check(model, optimizer)
    converted = [(layer, origin) for layer in _select(model, where).values() if (origin := origin_of(layer))]
    return _carry_out(model, [_Swap(layer, o.module, _restored(layer, o)) for layer, o in converted], optimizer)


@dataclass(frozen=True)
class LayerDescription:
    """One normalization layer, or what stands in for one.

    Attributes:
        path: Its path in the model.
        kind: Class of the layer that is there.
        features: Its number of features.
        replaced: Class of the layer it replaced, or None.
        lost: What the replaced layer did or kept that this one does not; empty if nothing, or if nothing was replaced.
        biased: Path of the layer that got a bias in exchange, or None.
        revision: What :func:`evenkeel.revisit` did to it, or None.
    """

    path: str
    kind: str
    features: int
    replaced: str | None = None
    lost: str = ""
    biased: str | None = None
    revision: Revision | None = None

    def __str__(self) -> str:
        words = f"{self.path or '(the model)'}: {self.kind}({self.features})"
        words += f" in place of {self.replaced}" if self.replaced else ""
        words += f", {self.biased} has a bias instead" if self.biased else ""
        words += f"; {self.lost}" if self.lost else ""
        return words + (f"; {self.revision}" if self.revision else "")


def describe(model: nn.Module) -> list[LayerDescription]:
    """What every normalization layer of ``model`` is, what it replaced and what was lost by it.

    Examples:
        >>> print(*describe(convert(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), "group")))
        1: GroupNorm(4) in place of BatchNorm1d; running statistics are kept but neither used nor updated
    """
    paths = {module: path for path, module in model.named_modules()}
    rows = []
    for path, layer in _select(model, None).items():
        origin = origin_of(layer)
        if origin is None:
            rows.append(LayerDescription(path, type(layer).__name__, features_of(layer), revision=revision_of(layer)))
            continue
        biased = None if origin.biased is None else paths.get(origin.biased)
        kind, replaced = type(layer).__name__, type(origin.module).__name__
        features, lost = features_of(origin.module), TARGETS[origin.to].lost
        rows.append(LayerDescription(path, kind, features, replaced, lost, biased, revision_of(layer)))
    return rows


def origin_of(module: nn.Module) -> Origin | None:
    """What ``module`` was converted from, or None."""
    return vars(module).get("evenkeel_origin")


def feeding(model: nn.Module) -> dict[nn.Module, Producer]:
    """:func:`evenkeel.graph.producers` as modules."""
    modules = dict(model.named_modules())
    pairs = ((modules[norm], modules[source]) for norm, source in producers(model).items())
    return {norm: source for norm, source in pairs if isinstance(source, PRODUCERS)}


def honours_bias(layer: nn.Module) -> bool:
    """Whether the layer computes as torch's own does, so that a bias it is given takes effect."""
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    names = ("forward", "_conv_forward")
    return any(
        isinstance(layer, cls) and all(getattr(type(layer), name, None) is getattr(cls, name, None) for name in names)
        for cls in plain
    )


def _check(model: nn.Module, optimizer: Optimizer | None) -> None:
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
    if optimizer is not None:
        check_optimizer(optimizer, model)


def _select(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """The normalization layers, and what stands in for one, that ``where`` chooses; each once, by its first path.

    Raises:
        ValueError: The model has no module at a path.
    """
    layers = {path: m for path, m in model.named_modules() if is_norm(m) or origin_of(m) is not None}
    if where is None:
        return layers
    if callable(where):
        return {path: layer for path, layer in layers.items() if where(path, layer)}
    everywhere = dict(model.named_modules(remove_duplicate=False))
    chosen: set[nn.Module] = set()
    for path in [where] if isinstance(where, str) else where:
        if path not in everywhere:
            near = difflib.get_close_matches(path, list(everywhere), n=1)
            raise ValueError(
                f"where: the model has no module {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        chosen.update(everywhere[path].modules())
    return {path: layer for path, layer in layers.items() if layer in chosen}


def _plan(
    model: nn.Module, path: str, layer: nn.Module, producer: Producer | None, to: str, settings: dict[str, Any]
) -> _Swap | None:
    """The swap that turns ``layer`` into the target, or None where it is one already or cannot be.

    Raises:
        ValueError: The layer is lazy and not yet initialised.
    """
    origin, target = origin_of(layer), TARGETS[to]
    if origin is not None and (origin.to, origin.settings) == (to, settings):
        return None
    if origin is None and target.is_native(layer) and not settings:
        return None
    restored = None if origin is None else _restored(layer, origin)
    if origin is not None and target.is_native(origin.module) and not settings:
        return _Swap(layer, origin.module, restored)
    source = layer if restored is None else restored
    if any(is_lazy(tensor) for tensor in (*source.parameters(), *source.buffers())):
        raise ValueError(
            f"{path}: {type(source).__name__} does not know its features yet; run one batch through the model first"
        )
    if isinstance(source, (nn.LayerNorm, nn.RMSNorm)) and not target.takes_tokens:
        return None
    if isinstance(source, nn.RMSNorm) and to != "none":
        return None
    biased = None
    if to == "none" and producer is not None and honours_bias(producer):
        new, biased = Removed(), producer if producer.bias is None else None
    else:
        new = target.build(source, lambda: spatial_dims(path, source, producer, model), **settings)
    _lend(source, new)
    module = layer if origin is None else origin.module
    vars(new)["evenkeel_origin"] = Origin(module, to, settings, biased)
    new.register_load_state_dict_pre_hook(_translate)
    return _Swap(layer, new, restored)


def _lend(source: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what ``source`` has beside its function: hooks, training flag, buffers (so the keys stay), marks."""
    mark(new, revision_of(source))
    for name in _HOOKS:
        vars(new)[name] = vars(source)[name]
    new.train(source.training)
    if isinstance(new, nn.GroupNorm):
        for name, buffer in source._buffers.items():
            new.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)


def _restored(layer: nn.Module, origin: Origin) -> nn.Module:
    """A copy of the layer that ``layer`` replaced, holding the tensors it would have now."""
    module = _twin(origin.module)
    parameters, buffers = module._parameters, module._buffers
    if not isinstance(layer, Removed):
        parameters.update({name: p for name, p in layer._parameters.items() if name in ("weight", "bias")})
    had = {name for name, buffer in buffers.items() if buffer is not None}
    buffers.update({name: b for name, b in layer._buffers.items() if name in had})
    if isinstance(module, _BatchNorm) and hasattr(layer, "to_batchnorm") and not _untouched(layer, origin):
        now: _BatchNorm = layer.to_batchnorm()  # pyright: ignore[reportCallIssue]
        buffers.update({name: b for name, b in now._buffers.items() if name in had - {"num_batches_tracked"}})
        module.eps = now.eps
    bias = (layer if origin.biased is None else origin.biased).bias if isinstance(layer, Removed) else None
    mean = buffers.get("running_mean")
    if mean is not None and bias is not None:
        buffers["running_mean"] = mean.to(bias.device) - bias.detach().to(mean.dtype)
    return module.train(layer.training)


def _untouched(layer: nn.Module, origin: Origin) -> bool:
    """Whether the statistics of ``layer`` are those that the conversion gave it, so the old ones are exact."""
    then = _rebuilt(origin.module, layer, origin).state_dict()
    now = layer.state_dict()
    return all(
        name in ("weight", "bias")
        or (t.device == now[name].device and t.dtype == now[name].dtype and t.equal(now[name]))
        for name, t in then.items()
    )


def _carry_out(model: nn.Module, swaps: list[_Swap], optimizer: Optimizer | None) -> nn.Module:
    before = dict(model.named_parameters())
    for swap in swaps:
        _settle(swap)
    replaced = {swap.old: swap.new for swap in swaps}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[name] = replaced[child]
    model = replaced.get(model, model)
    if optimizer is not None:
        regroup(optimizer, before, dict(model.named_parameters()))
    return model


def _settle(swap: _Swap) -> None:
    """Bring the replaced layer up to date, and take and give the biases of the layers before."""
    origin, future = origin_of(swap.old), origin_of(swap.new)
    if origin is not None and swap.restored is not None:
        vars(origin.module).update(vars(swap.restored))
        like = next(iter((*swap.old.parameters(), *swap.old.buffers())), None)
        if like is not None:
            origin.module.to(device=like.device)
        if origin.biased is not None:
            origin.biased.register_parameter("bias", None)
        if origin._bias_hook is not None:
            origin._bias_hook.remove()
    if future is not None and future.biased is not None:
        layer, beta = future.biased, getattr(future.module, "bias", None)
        features = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
        trainable = layer.weight.requires_grad if beta is None else beta.requires_grad
        layer.bias = nn.Parameter(layer.weight.new_zeros(features), requires_grad=trainable)
        future._bias_hook = layer.register_load_state_dict_pre_hook(_default_bias)


def _default_bias(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict from before a normalization was removed has no bias for the layer before it: it is 0."""
    if prefix + "weight" in state and layer.bias is not None:
        state.setdefault(prefix + "bias", torch.zeros_like(layer.bias))  # pyright: ignore[reportArgumentType]


def _translate(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a converted layer load a state dict of the layer it replaced, or of one that was its kind from the start."""
    origin = origin_of(layer)
    if origin is None:
        return
    given = {key[len(prefix) :] for key in state if key.startswith(prefix)}
    own, old = layer.state_dict(), set(origin.module.state_dict())
    if given == old and given != set(own):
        twin = _twin(origin.module)
        for tensors in (twin._parameters, twin._buffers):
            tensors.update({name: nn.Parameter(state[prefix + name], False) for name in tensors.keys() & old})
        for name in old:
            del state[prefix + name]
        fresh = _rebuilt(twin, layer, origin).state_dict()
        state.update({prefix + name: fresh[name] for name in own})
    elif given and given < set(own):
        state.update({prefix + name: own[name] for name in dict(layer.named_buffers()).keys() & own.keys() - given})


def _rebuilt(source: nn.Module, layer: nn.Module, origin: Origin) -> nn.Module:
    """What the conversion that made ``layer`` makes of ``source``."""
    new = TARGETS[origin.to].build(source, lambda: spatial_dims("", layer, None, layer), **origin.settings)
    _lend(source, new)
    return new


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy whose tensors can be exchanged without changing ``module``."""
    twin = copy.copy(module)
    vars(twin).update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    return twin
