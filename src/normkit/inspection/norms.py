"""Describe normalization layers: this package's layers declare their traits, and torch's are described here.

Whoever asks about a layer asks the functions of this module, so that none needs to know which layers there are.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.inspection.markers import Leaf
from normkit.moments import Moments, observe

Producer: TypeAlias = nn.Linear | _ConvNd
PRODUCERS = (nn.Linear, _ConvNd)
"""Layers with a weight whose output a normalization can take (transposed and lazy ones included)."""

_SPATIAL = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_TORCH_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

Source: TypeAlias = Literal["batch", "instance", "running", "learned", "none"]


class Statistics(NamedTuple):
    """Mean and variance per channel; the variance includes the layer's eps, so its root is the divisor."""

    mean: Tensor
    variance: Tensor


class NormTraits(Leaf):
    """The traits that a normalization layer of this package declares; a mixin.

    A class that states ``statistics`` in its own body defines what its subclasses compute: a user's subclass whose forward
    computes something else is told from it. The methods are batch normalization's; a layer with other statistics
    overrides them.

    Attributes:
        statistics: What it normalizes by in train mode: the batch, each instance, its running statistics, learned parameters, or
            nothing at all.
        per_channel: Whether each channel is normalized by itself.
        centers: Whether the mean is removed.
        hidden: Whether it stands between layers, where another normalization can take its place.
        noisy: Whether noise is added to the normalized values in train mode.
        keeps_scale: Why a factor on its input is not removed although it divides by statistics; empty if it is removed.
        feature_dim: Dimension that holds the features.
        dimensions: Numbers of dimensions that an input may have; empty if that does not matter.
    """

    statistics: ClassVar[Source] = "none"
    per_channel: ClassVar[bool] = True
    centers: ClassVar[bool] = True
    hidden: ClassVar[bool] = True
    noisy: ClassVar[bool] = False
    keeps_scale: ClassVar[str] = ""
    feature_dim: Any = 1
    dimensions: ClassVar[tuple[int, ...]] = ()

    def batch_statistics(self: Any, x: Tensor) -> tuple[Statistics, Tensor]:
        """See :func:`batch_statistics`."""
        seen = observe(x, feature_dim(self))
        return Statistics(seen.mean, seen.variance + self.eps), self.eps / (seen.variance + self.eps)

    def normalize_by_batch(self: Any, x: Tensor) -> Tensor:
        """See :func:`normalize_by_batch`."""
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0, self.eps)

    def observe_input(self: Any, x: Tensor, mask: Tensor | None = None) -> Moments:
        """See :func:`observe_input`."""
        return observe(x, feature_dim(self), mask)

    def adopt_statistics(self: Any, moments: Moments) -> None:
        """See :func:`adopt_statistics`."""
        self.running_mean.copy_(moments.mean)
        self.running_var.copy_(moments.m2 / (moments.count - 1).clamp(min=1))  # unbiased, as batch normalization's


def _traits(norm: nn.Module) -> Any:
    """The class whose methods describe ``norm``: its own, or batch normalization's."""
    return type(norm) if isinstance(norm, NormTraits) else NormTraits


def statistics_of(module: nn.Module) -> Source:
    """Return which statistics ``module`` uses in train mode; ``none`` for a module that is no normalization."""
    if isinstance(module, NormTraits):
        return module.statistics
    if isinstance(module, _BatchNorm):
        return "batch"
    return "instance" if isinstance(module, _TORCH_NORMS) else "none"


def is_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a normalization between layers: torch's, this package's, or a subclass."""
    return statistics_of(module) != "none" and (not isinstance(module, NormTraits) or module.hidden)


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is a batch normalization without parameters: all four of its tensors are buffers."""
    names = {name for name, _ in module.named_buffers()} - {"num_batches_tracked"}
    return names == {"weight", "bias", "running_mean", "running_var"} and not any(True for _ in module.parameters())


def is_batchnorm(norm: nn.Module) -> bool:
    """Return whether ``norm`` is torch's batch normalization or a user's subclass, and not one of this package."""
    return isinstance(norm, _BatchNorm) and not isinstance(norm, NormTraits)


def is_placeholder(module: nn.Module) -> bool:
    """Return whether ``module`` replaces a normalization and normalizes nothing."""
    return isinstance(module, NormTraits) and module.statistics == "none"


def is_noisy(norm: nn.Module) -> bool:
    """Return whether ``norm`` adds noise in train mode."""
    return isinstance(norm, NormTraits) and norm.noisy


def stated_type(norm: nn.Module) -> Any:
    """Return the class, torch's or this package's, that defines what ``norm`` computes."""
    return next(
        c
        for c in type(norm).__mro__
        if c.__module__.startswith("torch.nn.") or (issubclass(c, NormTraits) and "statistics" in vars(c))
    )


def features_of(norm: nn.Module) -> int:
    """Return the number of features of a normalization layer."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return math.prod(norm.normalized_shape)
    if is_frozen_norm(norm):
        return norm._buffers["weight"].numel()  # pyright: ignore[reportOptionalMemberAccess]
    return int(vars(norm)["num_features"])


def feature_dim(module: nn.Module) -> int:
    """Return the dimension of a layer's output that holds its features."""
    return -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm) else getattr(module, "feature_dim", 1)


def outputs(layer: nn.Linear | _ConvNd) -> int:
    """Return the number of output features or channels of a layer."""
    return layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features


def takes_maps(norm: nn.Module) -> bool:
    """Return whether the channels of ``norm`` are never the last dimension of its input."""
    several = isinstance(norm, NormTraits) and bool(norm.dimensions) and 2 not in norm.dimensions
    return feature_dim(norm) != -1 and (several or isinstance(norm, _SPATIAL))


def aligned(layer: nn.Linear | _ConvNd, norm: nn.Module) -> bool:
    """Return whether the channels of the normalization, as far as they are known, can be the outputs of the layer."""
    if isinstance(layer, nn.Linear) and takes_maps(norm):
        return False  # maps have their channels in dimension 1, a linear layer its outputs in the last
    return getattr(norm, "num_features", getattr(norm, "num_channels", 0)) in (0, outputs(layer))


def scale_obstacle(norm: nn.Module) -> str | None:
    """Return why ``norm`` does not remove a factor on one channel of its input, or None where it does."""
    if isinstance(norm, nn.GroupNorm):
        channels = norm.num_channels // norm.num_groups
        several = f"GroupNorm normalizes {channels} channels together: one filter may not be scaled"
        return None if channels == 1 else several
    if isinstance(norm, NormTraits):
        if norm.keeps_scale:
            return norm.keeps_scale
        own = norm.per_channel and norm.statistics in ("batch", "instance")
    else:
        own = isinstance(norm, _BatchNorm | _InstanceNorm)
    return None if own else f"{type(norm).__name__} does not normalize each channel by its own batch statistics"


def removes_mean(norm: nn.Module) -> bool:
    """Return whether a normalization per channel removes a constant that is added to a channel."""
    return not isinstance(norm, NormTraits) or norm.centers


def uses_batch_statistics(module: nn.Module) -> bool:
    """Return whether the module normalizes by statistics of the batch in its present mode."""
    return statistics_of(module) == "batch" and (module.training or module.running_mean is None)


def normalizes_own_input(norm: nn.Module) -> bool:
    """Return whether ``norm`` uses the statistics of each sample in eval mode, too."""
    tracks = isinstance(norm, _InstanceNorm) and norm.running_mean is not None
    return statistics_of(norm) == "instance" and not tracks


def running_tensors(norm: nn.Module) -> dict[str, Tensor]:
    """Return the tensors beside parameters that ``norm`` evaluates with, by their names in batch normalization."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    tensors = {name: t for name in names if (t := getattr(norm, name, None)) is not None}
    return {name: t.detach().clone() if isinstance(t, nn.Parameter) else t for name, t in tensors.items()}


def running_statistics(module: nn.Module) -> Statistics | None:
    """Return a copy of the statistics with which a layer evaluates, or None where it has none."""
    if statistics_of(module) not in ("batch", "running", "learned"):
        return None
    mean, var, eps = (getattr(module, name) for name in ("running_mean", "running_var", "eps"))
    return None if mean is None or var is None else Statistics(mean.detach().clone(), var.detach() + eps)


@torch.no_grad()
def has_initial_statistics(norm: nn.Module) -> bool:
    """Return whether the running statistics of ``norm`` are still mean 0 and variance 1.

    ``num_batches_tracked`` cannot tell: converted and old checkpoints hold real statistics beside a counter of zero.
    """
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or var is None:
        return False
    return bool((mean == 0).all() & ((var - 1).abs() < 1e-3).all())  # l_p layers keep (1 + eps)^2 - eps


def can_adopt_statistics(module: nn.Module) -> bool:
    """Return whether the running statistics of a normalization can be set, see :func:`adopt_statistics`."""
    follows = is_norm(module) and statistics_of(module) in ("batch", "running", "learned")
    return follows and getattr(module, "running_mean", None) is not None


def batch_statistics(module: nn.Module, x: Tensor) -> tuple[Statistics, Tensor]:
    """Return the statistics with which a layer would normalize ``x``, and the share of eps in its divisor, per channel."""
    return _traits(module).batch_statistics(module, x)


def normalize_by_batch(norm: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a layer for ``x`` by the statistics of ``x``, without noise; running statistics stay."""
    return _traits(norm).normalize_by_batch(norm, x)


def observe_input(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> Moments:
    """Return the moments of one input from which a layer's running statistics are made; they can be merged.

    Args:
        norm: A layer; its features are in dimension ``feature_dim``, 1 where it has no such attribute.
        x: Its input.
        mask: Rows that count, see :func:`normkit.moments.observe`.
    """
    return _traits(norm).observe_input(norm, x, mask)


@torch.no_grad()
def adopt_statistics(norm: nn.Module, moments: Moments) -> None:
    """Set a layer's running statistics to merged observations of :func:`observe_input`."""
    _traits(norm).adopt_statistics(norm, moments)
