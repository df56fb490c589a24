"""What a normalization layer can be converted to: one entry per target.

A layer class of this package becomes a target by its classmethod ``from_batchnorm``. It keeps what it evaluates with under
the names of batch normalization's running statistics, whatever they mean in training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from normkit.inspection.norms import (
    NormTraits,
    features_of,
    is_batchnorm,
    running_statistics,
    running_tensors,
    statistics_of,
)
from normkit.methods.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from normkit.methods.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from normkit.methods.lp_norm import LpNorm1d, LpNorm2d, LpNorm3d
from normkit.methods.method import share_affine
from normkit.methods.noisy_norm import NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d
from normkit.methods.online import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d

Dims = Callable[[], int]
"""Tells on demand whether a layer sees sequences (1), images (2) or volumes (3); raises where that is unknown."""


@dataclass(frozen=True)
class Target:
    """One thing to convert to.

    Attributes:
        build: Makes the new layer from a normalization layer, with settings of the new layer; it shares the parameters
            that mean the same.
        is_native: Whether a layer is that already.
        lost: What the layer no longer keeps or does, in words.
        takes_tokens: Whether it can stand in for a layer normalization, whose channels are the last dimension.
        configurable: Whether ``build`` takes settings of the new layer.
        freezes_bias: Whether the bias of the layer before is no longer trained: the new layer takes a constant out, but,
            without the projection of batch normalization's backward pass, does not stop it from being trained, and it
            would grow for nothing.
        needs_positions: Whether it needs several values per channel and sample, so that flat features cannot have it.
    """

    build: Callable[..., nn.Module]
    is_native: Callable[[nn.Module], bool]
    lost: str = ""
    takes_tokens: bool = False
    configurable: bool = False
    freezes_bias: bool = False
    needs_positions: bool = False


class Removed(NormTraits, nn.Identity):
    """Stands where a normalization was: adds a trainable bias per channel, or does nothing.

    The layer it replaced moves along with it (device, dtype), so that it can come back.

    Args:
        shape: ``(C,)``, the normalized shape of a layer normalization, or None: no bias.
        channel_dim: 1 for feature maps; -1 where ``shape`` is that of the last dimensions.
    """

    statistics = "none"

    def __init__(self, shape: tuple[int, ...] | None = None, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.bias = None if shape is None else nn.Parameter(torch.zeros(shape))

    @property
    def feature_dim(self) -> int:
        """Dimension of the channels."""
        return self.channel_dim

    def forward(self, input: Tensor) -> Tensor:
        """``input``, plus the bias of its channel if there is one."""
        if self.bias is None:
            return input
        return input + (self.bias if self.channel_dim == -1 else self.bias.reshape(-1, *([1] * (input.ndim - 2))))

    def extra_repr(self) -> str:
        """The settings."""
        return "" if self.bias is None else f"{tuple(self.bias.shape)}, channel_dim={self.channel_dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        origin = vars(self).get("normkit_origin")
        if origin is not None:
            origin.module._apply(fn, recurse)
        return super()._apply(fn, recurse)


def group_count(features: int) -> int:
    """Number of groups GroupNorm gets: the largest divisor of ``features`` up to 32 that leaves four channels each.

    32 is the literature's choice from 128 channels on; narrower layers keep at least four channels per group, since a
    group of one channel at one position would be normalised to zero.

    Examples:
        >>> [group_count(c) for c in (3, 16, 24, 64, 128, 512)]
        [1, 4, 6, 16, 32, 32]
    """
    return max(g for g in range(1, max(1, min(32, features // 4)) + 1) if features % g == 0)


def spatial_dims(path: str, norm: nn.Module, producer: nn.Module | None, model: nn.Module) -> int:
    """Dimensions that ``norm`` sees, from itself, the layer before it, or the model's convolutions.

    Raises:
        ValueError: They cannot be told.
    """
    for family in _FAMILIES.values():
        for dims, cls in family.items():
            if isinstance(norm, cls):
                return dims
    if isinstance(producer, nn.Linear):
        return 1
    layers = [producer] if isinstance(producer, _ConvNd) else [m for m in model.modules() if isinstance(m, _ConvNd)]
    found = {len(layer.kernel_size) for layer in layers}
    if len(found) != 1:
        raise ValueError(
            f"{path}: cannot tell whether this {type(norm).__name__} sees sequences, images or volumes; convert it "
            "by hand, or leave it out with `where`"
        )
    return found.pop()


def _to_batchnorm(source: nn.Module, dims: Dims) -> _BatchNorm:
    """``source`` if it is a batch normalization, else one with its parameters and the statistics that it has."""
    if is_batchnorm(source):
        return source
    like = next((t for t in (*source.parameters(), *source.buffers())), torch.empty(0))
    options = {name: vars(source)[name] for name in ("eps", "momentum") if name in vars(source)}
    if statistics_of(source) == "batch":
        options["track_running_stats"] = running_statistics(source) is not None
    cls = _FAMILIES["batch"][dims()]
    new = cls(features_of(source), affine=False, device=like.device, dtype=like.dtype, **options)
    new._buffers.update({name: t for name, t in running_tensors(source).items() if name in new._buffers})
    share_affine(source, new)
    return new.train(source.training)


def _to_groups(source: nn.Module, groups: int) -> nn.Module:
    new = nn.GroupNorm(groups, features_of(source), eps=vars(source)["eps"], affine=False)
    share_affine(source, new)
    return new


def _to_removed(source: nn.Module, _: Dims) -> nn.Module:
    beta = source._parameters.get("bias")
    if beta is None:
        return Removed()
    new = Removed(tuple(beta.shape), -1 if isinstance(source, nn.LayerNorm) else 1)
    new.bias = nn.Parameter(torch.zeros_like(beta), requires_grad=beta.requires_grad)
    return new


def _ours(family: str, lost: str = "", takes_tokens: bool = False, **fixed: Any) -> Target:
    """The target that a family of this package's layers is; ``fixed`` settings tell it from others of the family."""
    classes = _FAMILIES[family]

    def build(source: nn.Module, dims: Dims, **settings: Any) -> nn.Module:
        if isinstance(source, nn.LayerNorm):
            like = {"device": source.weight.device, "dtype": source.weight.dtype} if source.elementwise_affine else {}
            options = {"feature_dim": -1, "eps": source.eps, **like, **fixed, **settings}
            new = classes[1](source.normalized_shape[-1], affine=source.elementwise_affine, **options)
        else:
            new = classes[dims()].from_batchnorm(_to_batchnorm(source, dims), **fixed, **settings)
        share_affine(source, new)
        return new

    def is_native(module: nn.Module) -> bool:
        fits = all(getattr(module, name, None) == value for name, value in fixed.items())
        return isinstance(module, tuple(classes.values())) and fits

    return Target(build, is_native, lost, takes_tokens, configurable=True, freezes_bias=family == "batchless")


_FAMILIES: dict[str, dict[int, Any]] = {
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "renorm": {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d},
    "batchless": {1: BatchlessNorm1d, 2: BatchlessNorm2d, 3: BatchlessNorm3d},
    "lp": {1: LpNorm1d, 2: LpNorm2d, 3: LpNorm3d},
    "noisy": {1: NoisyBatchNorm1d, 2: NoisyBatchNorm2d, 3: NoisyBatchNorm3d},
    "frozen": {1: FrozenBatchNorm1d, 2: FrozenBatchNorm2d, 3: FrozenBatchNorm3d},
    "online": {1: OnlineNorm1d, 2: OnlineNorm2d, 3: OnlineNorm3d},
}

_UNUSED = "running statistics are kept but neither used nor updated"
_FIT = "statistics start at (0, 1) where the replaced layer had none"

TARGETS: dict[str, Target] = {
    "none": Target(
        _to_removed,
        lambda m: False,
        "weight, bias and running statistics are set aside until revert and not saved: what loads where they are expected "
        "is revert(copy.deepcopy(model)).state_dict()",
        takes_tokens=True,
    ),
    "batch": Target(_to_batchnorm, is_batchnorm, _FIT),
    "group": Target(
        lambda source, _: _to_groups(source, group_count(features_of(source))),
        lambda m: isinstance(m, nn.GroupNorm) and (m.num_groups > 1 or group_count(m.num_channels) == 1),
        _UNUSED,
    ),
    "layer": Target(
        lambda source, _: _to_groups(source, 1),
        lambda m: isinstance(m, nn.LayerNorm) or (isinstance(m, nn.GroupNorm) and m.num_groups == 1),
        _UNUSED,
    ),
    "instance": Target(
        lambda source, _: _to_groups(source, features_of(source)),  # a group per channel
        lambda m: isinstance(m, nn.GroupNorm) and m.num_groups == m.num_channels,
        _UNUSED,
        needs_positions=True,
    ),
    "batch-renorm": _ours("renorm", _FIT),
    "frozen": _ours("frozen", "statistics are never updated"),
    "online": _ours("online", _FIT + ", and every sample is scaled by its features' root mean square"),
    "batchless": _ours("batchless", _FIT, takes_tokens=True, projected=False),
    "batchless-projected": _ours("batchless", _FIT, takes_tokens=True, projected=True),
    "l1": _ours("lp", _FIT, p=1),
    "l2": _ours("lp", _FIT, p=2),
    "linf": _ours("lp", _FIT, p=math.inf),
    "noisy-batch": _ours("noisy", _FIT),
}
"""Name -> target, in the order in which error messages list them."""
