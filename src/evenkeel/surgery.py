"""Replace normalization layers in any model, and put them back.

Every replacement is planned first and carried out last, so that a model is as it was when something raises. A
replaced layer lends its parameters, buffers and hooks to the layer that stands in for it: tied parameters stay
tied, an optimizer goes on, handles still remove their hooks, and state dicts of either form load into the other
wherever both have the same tensors.
"""

import difflib
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from evenkeel.graph import PRODUCERS, is_norm, producers
from evenkeel.methods.lp_norm import LpNorm, LpNorm1d, LpNorm2d, LpNorm3d
from evenkeel.methods.noisy_norm import NoisyBatchNorm, NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d

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


@dataclass(frozen=True)
class Origin:
    """What stood where a converted layer stands now.

    Attributes:
        module: The replaced layer.
        to: The target it was converted to.
        biased: The layer before it that got a bias in exchange, if one did.
    """

    module: nn.Module
    to: str
    biased: Producer | None = None


@dataclass(frozen=True)
class _Swap:
    old: nn.Module
    new: nn.Module
    bias_for: Producer | None = None
    unbias: Producer | None = None


class Bias(nn.Module):
    """Adds a trainable bias per channel: what is left of a removed normalization that no layer's bias can replace.

    Args:
        features: Number of channels.
        channel_dim: 1 for feature maps, -1 for tokens.
    """

    def __init__(self, features: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.features, self.channel_dim = features, channel_dim
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` plus the bias of its channel."""
        if self.channel_dim == -1:
            return x + self.bias
        return x + self.bias.reshape(-1, *([1] * (x.ndim - 2)))

    def extra_repr(self) -> str:
        """Arguments of the layer."""
        return f"{self.features}, channel_dim={self.channel_dim}"


def group_count(features: int) -> int:
    """Number of groups GroupNorm gets: the largest divisor of ``features`` up to 32 that leaves four channels each.

    32 is the literature's choice from 128 channels on; narrower layers keep at least four channels per group, since
    a group of one channel at one position would be normalised to zero.

    Examples:
        >>> [group_count(c) for c in (3, 16, 24, 64, 128, 512)]
        [1, 4, 6, 16, 32, 32]
    """
    return max(g for g in range(1, max(1, min(32, features // 4)) + 1) if features % g == 0)


def convert(model: nn.Module, to: str, *, where: Where = None, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace the normalization layers of ``model`` by those of another method.

    Targets: ``group`` (GroupNorm, see :func:`group_count`), ``layer`` (one group: LayerNorm over channels and space),
    ``none`` (removed; the layer before gets its bias back, or a :class:`Bias` stands in), ``batch`` (BatchNorm),
    ``l1``, ``l2``, ``linf`` (l_p normalization), ``noisy-batch`` (BatchNorm with noise behind it).

    Args:
        model: Any module, changed in place.
        to: The target.
        where: Which layers: a predicate ``(path, layer) -> bool``, or paths of layers or of modules that hold them.
        optimizer: An optimizer over the model's parameters, repaired when parameters come or go.

    Returns:
        The model; the returned one counts when the model itself is a normalization layer.

    Raises:
        ValueError: The target, or a path in ``where``, is unknown, or the model is wrapped in DistributedDataParallel.

    Examples:
        >>> convert(nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)), "group")[1]
        GroupNorm(4, 16, eps=1e-05, affine=True, bias=True)
    """
    if to not in _TARGETS:
        raise ValueError(f"convert: unknown target {to!r}; choose one of {', '.join(_TARGETS)}")
    _check_unwrapped(model)
    layers = _select(model, where)
    if not layers:
        warnings.warn(
            f"convert: the model has no normalization layer to convert to {to!r}; it is unchanged", stacklevel=2
        )
        return model
    fed_by = feeding(model)
    swaps = [s for path, layer in layers.items() if (s := _plan(path, layer, to, fed_by.get(layer), model)) is not None]
    return _carry_out(model, swaps, optimizer)


def revert(model: nn.Module, *, where: Where = None, optimizer: Optimizer | None = None) -> nn.Module:
    """Put back every layer that :func:`convert` replaced, with the parameters and statistics it would have now.

    Args:
        model: A converted model, changed in place.
        where: Which layers, as in :func:`convert`.
        optimizer: As in :func:`convert`.

    Returns:
        The model; the returned one counts when the model itself is a normalization layer.
    """
    _check_unwrapped(model)
    swaps = [_undo(layer) for layer in _select(model, where).values() if origin_of(layer) is not None]
    return _carry_out(model, swaps, optimizer)


def origin_of(module: nn.Module) -> Origin | None:
    """What ``module`` was converted from, or None."""
    return vars(module).get("evenkeel_origin")


def _check_unwrapped(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{path or 'the model'} is wrapped in DistributedDataParallel, which has registered the parameters of "
                "the layers to replace; convert the bare model first, then wrap it (wrapped.module is the bare model)"
            )


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


def feeding(model: nn.Module) -> dict[nn.Module, Producer]:
    """Each normalization layer's :func:`evenkeel.graph.producers`, as modules."""
    modules = dict(model.named_modules())
    pairs = ((modules[norm], modules[source]) for norm, source in producers(model).items())
    return {norm: source for norm, source in pairs if isinstance(source, PRODUCERS)}


def _honours_bias(layer: Producer) -> bool:
    """Whether the layer's forward is torch's own, so that a bias it is given takes effect."""
    known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return any(isinstance(layer, k) and type(layer).forward is k.forward for k in known)


def _plan(path: str, layer: nn.Module, to: str, producer: Producer | None, model: nn.Module) -> _Swap | None:
    """The swap that turns ``layer`` into the target, or None where it is one already.

    Raises:
        ValueError: The layer is lazy and not yet initialised.
    """
    origin, target = origin_of(layer), _TARGETS[to]
    if origin is not None and origin.to == to:
        return None
    if origin is None and target.is_native(layer):
        return None
    undo = _undo(layer) if origin is not None else None
    source = layer if undo is None else undo.new
    if undo is not None and target.is_native(source):
        return undo
    if any(is_lazy(tensor) for tensor in (*source.parameters(), *source.buffers())):
        raise ValueError(
            f"{path}: {type(source).__name__} does not know its features yet; run one batch through the model first"
        )
    if isinstance(source, (nn.LayerNorm, nn.RMSNorm)) and to != "none":
        return None  # it normalises the last dimension, the others the second: no such layer can stand in for it
    bias_for = None
    if to == "none" and producer is not None and _honours_bias(producer):
        new, bias_for = nn.Identity(), producer if producer.bias is None else None
    else:
        new = target.build(source, lambda: _dims(path, source, producer, model))
    _lend(source, new)
    vars(new)["evenkeel_origin"] = Origin(source, to, bias_for)
    return _Swap(layer, new, bias_for, undo.unbias if undo is not None else None)


def _undo(layer: nn.Module) -> _Swap:
    origin = origin_of(layer)
    assert origin is not None
    for kind in ("_buffers",) if isinstance(layer, Bias) else ("_parameters", "_buffers"):
        ours, theirs = vars(layer)[kind], vars(origin.module)[kind]
        theirs.update({name: ours[name] for name in theirs if ours.get(name) is not None})
    origin.module.train(layer.training)
    return _Swap(layer, origin.module, None, origin.biased)


def _lend(source: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what ``source`` has beside its function: hooks, training flag, buffers (so the keys stay)."""
    for name in _HOOKS:
        vars(new)[name] = vars(source)[name]
    new.train(source.training)
    if isinstance(new, nn.Identity):
        return
    for name, buffer in source._buffers.items():
        if name not in new._buffers and name not in new._parameters:
            new.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)


def _carry_out(model: nn.Module, swaps: list[_Swap], optimizer: Optimizer | None) -> nn.Module:
    before = dict(model.named_parameters())
    for swap in swaps:
        if swap.unbias is not None:
            _take_bias(swap.unbias, swap.new)
        if swap.bias_for is not None:
            _give_bias(swap.bias_for, swap.old)
    replaced = {swap.old: swap.new for swap in swaps}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[name] = replaced[child]
    model = replaced.get(model, model)
    if optimizer is not None:
        _repair(optimizer, before, dict(model.named_parameters()))
    return model


def _give_bias(layer: Producer, norm: nn.Module) -> None:
    beta = getattr(norm, "bias", None)
    trainable = layer.weight.requires_grad if beta is None else beta.requires_grad
    features = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    layer.bias = nn.Parameter(layer.weight.new_zeros(features), requires_grad=trainable)


def _take_bias(layer: Producer, norm: nn.Module) -> None:
    """Drop a bias that the layer was given; running statistics absorb it, so that eval stays the same function."""
    mean = norm._buffers.get("running_mean")
    if mean is not None and layer.bias is not None:
        norm._buffers["running_mean"] = mean - layer.bias.detach().to(mean.dtype)
    layer.register_parameter("bias", None)


def _repair(optimizer: Optimizer, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter]) -> None:
    """Let ``optimizer`` hold the parameters the model has now; state stays with every parameter that lives on."""
    known, alive = set(before.values()), set(now.values())
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    newcomers = [(name, p) for name, p in now.items() if p not in known and p.requires_grad]
    homes = [_home(name, before, now, group_of) for name, _ in newcomers]
    for group in optimizer.param_groups:
        keep = [i for i, p in enumerate(group["params"]) if p in alive or p not in known]
        for p in known - alive:
            optimizer.state.pop(p, None)
        for key in {"params", "param_names"} & group.keys():
            group[key][:] = [group[key][i] for i in keep]
    for (name, parameter), group in zip(newcomers, homes, strict=True):
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)


def _home(
    name: str, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter], group_of: dict[nn.Parameter, dict]
) -> dict:
    """The group of a parameter of the same layer (as it is or was), else of the nearest one in the model."""
    layer, order = name.rpartition(".")[0], list(now)
    at = order.index(name)
    siblings = [p for names in (now, before) for n, p in names.items() if n.rpartition(".")[0] == layer]
    nearest = [now[n] for n in sorted(order, key=lambda n: abs(order.index(n) - at))]
    return next(group_of[p] for p in siblings + nearest if p in group_of)


@dataclass(frozen=True)
class _Target:
    """One thing to convert to: how it is built from a normalization layer, and which layers are it already."""

    build: Callable[[nn.Module, Callable[[], int]], nn.Module]
    is_native: Callable[[nn.Module], bool]


def features_of(norm: nn.Module) -> int:
    """Number of features of a normalization layer."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return math.prod(norm.normalized_shape)
    return int(norm.num_features)  # pyright: ignore[reportArgumentType]


def _to_groups(source: nn.Module, groups: int) -> nn.Module:
    new = nn.GroupNorm(groups, features_of(source), eps=source.eps, affine=False)  # pyright: ignore[reportArgumentType]
    new.register_parameter("weight", source._parameters.get("weight"))
    new.register_parameter("bias", source._parameters.get("bias"))
    new.affine = new.weight is not None
    return new


def _dims(path: str, source: nn.Module, producer: Producer | None, model: nn.Module) -> int:
    """Dimensions that a normalization layer sees, from itself, the layer before it or the model's convolutions.

    Raises:
        ValueError: They cannot be told.
    """
    for dims in (1, 2, 3):
        if isinstance(source, _BY_DIMS[dims]):
            return dims
    if isinstance(producer, nn.Linear):
        return 1
    layers = [producer] if isinstance(producer, _ConvNd) else [m for m in model.modules() if isinstance(m, _ConvNd)]
    found = {len(layer.kernel_size) for layer in layers}
    if len(found) != 1:
        raise ValueError(
            f"{path}: cannot tell whether this {type(source).__name__} sees sequences, images or volumes; convert it "
            "by hand, or leave it out with `where`"
        )
    return found.pop()


_BY_DIMS = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}


def _to_batch(source: nn.Module, dims: Callable[[], int]) -> nn.Module:
    like = next(source.parameters(), next(source.buffers(), torch.empty(0)))
    new = _BY_DIMS[dims()][0](features_of(source), eps=source.eps, device=like.device, dtype=like.dtype)
    for name in ("weight", "bias"):
        new.register_parameter(name, source._parameters.get(name))
    new.affine = new.weight is not None
    return new


def _to_bias(source: nn.Module, dims: Callable[[], int]) -> nn.Module:
    beta = source._parameters.get("bias")
    if beta is None:
        return nn.Identity()
    new = Bias(features_of(source), -1 if isinstance(source, nn.LayerNorm) else 1)
    new.bias = nn.Parameter(torch.zeros_like(beta), requires_grad=beta.requires_grad)
    return new


def _through_batch(layers: dict[int, type], **settings: float) -> Callable[[nn.Module, Callable[[], int]], nn.Module]:
    """Build a layer by its ``from_batchnorm``, from a batch normalization that is there or one made for it."""

    def build(source: nn.Module, dims: Callable[[], int]) -> nn.Module:
        norm = source if isinstance(source, _BatchNorm) else _to_batch(source, dims)
        return layers[dims()].from_batchnorm(norm, **settings)

    return build


def _lp(p: float) -> _Target:
    layers: dict[int, type] = {1: LpNorm1d, 2: LpNorm2d, 3: LpNorm3d}
    return _Target(_through_batch(layers, p=p), lambda m: isinstance(m, LpNorm) and m.p == p)


_NOISY: dict[int, type] = {1: NoisyBatchNorm1d, 2: NoisyBatchNorm2d, 3: NoisyBatchNorm3d}

_TARGETS: dict[str, _Target] = {
    "batch": _Target(_to_batch, lambda m: isinstance(m, _BatchNorm)),
    "group": _Target(
        lambda source, _: _to_groups(source, group_count(features_of(source))),
        lambda m: isinstance(m, nn.GroupNorm) and (m.num_groups > 1 or group_count(m.num_channels) == 1),
    ),
    "layer": _Target(
        lambda source, _: _to_groups(source, 1),
        lambda m: isinstance(m, nn.LayerNorm) or (isinstance(m, nn.GroupNorm) and m.num_groups == 1),
    ),
    "none": _Target(_to_bias, lambda m: False),
    "l1": _lp(1),
    "l2": _lp(2),
    "linf": _lp(math.inf),
    "noisy-batch": _Target(_through_batch(_NOISY), lambda m: isinstance(m, NoisyBatchNorm)),
}
