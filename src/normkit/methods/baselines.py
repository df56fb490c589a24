"""The normalizers that every comparison needs beside the methods: none, batch, group and layer normalization.

Batch Normalization, Ioffe, Szegedy 2015, arXiv 1502.03167. Group Normalization, Wu, He 2018, arXiv 1803.08494. Layer
Normalization, Ba, Kiros, Hinton 2016, arXiv 1607.06450.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normkit.inspection.norms import NormTraits, features_of, is_batchnorm
from normkit.methods.method import (
    FROM_START,
    ZERO_RESIDUAL,
    Dims,
    Method,
    Part,
    Recipe,
    Target,
    share_affine,
    to_batchnorm,
)


class Removed(NormTraits, nn.Identity):
    """Replaces a normalization by a trainable bias per channel, or by nothing.

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
        """Return ``input``, plus the bias of its channel if there is one."""
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
    """Return the number of groups of GroupNorm: the largest divisor of ``features`` up to 32 that leaves four channels each.

    32 is the literature's choice from 128 channels on; narrower layers keep at least four channels per group, since a
    group of one channel at one position would be normalized to zero.

    Examples:
        >>> [group_count(c) for c in (3, 16, 24, 64, 128, 512)]
        [1, 4, 6, 16, 32, 32]
    """
    return max(g for g in range(1, max(1, min(32, features // 4)) + 1) if features % g == 0)


def _to_groups(source: nn.Module, groups: int) -> nn.Module:
    new = nn.GroupNorm(groups, features_of(source), eps=vars(source)["eps"], affine=False)
    share_affine(source, new)
    return new


def _to_removed(source: nn.Module, _: Dims) -> nn.Module:
    beta = source._parameters.get("bias")
    last = isinstance(source, nn.LayerNorm | nn.RMSNorm)
    shape = source.normalized_shape if last else (features_of(source),)
    new = Removed(tuple(shape), -1 if last else 1)
    like = next((t for t in (beta, *source.parameters(), *source.buffers()) if t is not None), None)
    if like is not None:
        new = new.to(like.device, like.dtype)
    if beta is not None:
        new.requires_grad_(beta.requires_grad)
    return new


_UNUSED = "running statistics are set aside until revert and not saved"
_GROUP = "Baselines"

METHOD = Method(
    recipes=(
        Recipe(
            "none",
            "No normalization: layers removed, biases restored",
            "the baseline",
            0.1,
            convert=Part("none"),
            prepare=ZERO_RESIDUAL,
            group=_GROUP,
        ),
        Recipe(
            "batch",
            "Batch normalization, as the model has it",
            "Ioffe, Szegedy 2015, arXiv 1502.03167",
            0.1,
            group=_GROUP,
        ),
        Recipe(
            "group",
            "Group normalization",
            "Wu, He 2018, arXiv 1803.08494",
            0.1,
            convert=Part("group"),
            group=_GROUP,
        ),
        Recipe(
            "layer",
            "Layer normalization over channels and positions",
            "Ba et al. 2016, arXiv 1607.06450",
            0.1,
            convert=Part("layer"),
            group=_GROUP,
            ablation=True,
        ),
        Recipe(
            "instance",
            "Instance normalization",
            "Ulyanov et al. 2016, arXiv 1607.08022",
            0.1,
            convert=Part("instance"),
            group=_GROUP,
        ),
    ),
    targets={
        "none": Target(
            _to_removed,
            lambda m: False,
            "weight, bias and running statistics are set aside until revert and not saved: what loads where they are "
            "expected is revert(copy.deepcopy(model)).state_dict()",
            channels_last=True,
            another=True,
        ),
        "batch": Target(to_batchnorm, is_batchnorm, FROM_START),
        "group": Target(
            lambda source, _: _to_groups(source, group_count(features_of(source))),
            lambda m: isinstance(m, nn.GroupNorm) and (m.num_groups > 1 or group_count(m.num_channels) == 1),
            _UNUSED,
            another=True,
        ),
        "layer": Target(
            lambda source, _: _to_groups(source, 1),
            lambda m: isinstance(m, nn.LayerNorm) or (isinstance(m, nn.GroupNorm) and m.num_groups == 1),
            _UNUSED,
            another=True,
        ),
        "instance": Target(
            lambda source, _: _to_groups(source, features_of(source)),  # a group per channel
            lambda m: isinstance(m, nn.GroupNorm) and m.num_groups == m.num_channels,
            _UNUSED,
            another=True,
        ),
    },
)
