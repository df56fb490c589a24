"""Batch normalization followed by noise whose distribution changes at every step.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604. A probe, not a method to train with: the noise makes the distributions of the layers'
inputs unstable on purpose, and networks with it train about as well as with plain batch normalization.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.inspection.markers import Leaf
from normkit.methods.method import Method, Part, Recipe, Successor, layer_target


def moment_noise(x: Tensor) -> Tensor:
    """Return ``s x + m`` with scales and shifts that are drawn anew at every call.

    Per channel, ``mu ~ U(-0.5, 0.5)`` and ``sigma ~ U(1, 1.25)``; per element, ``m ~ U(mu - 0.1, mu + 0.1)`` and
    ``s ~ N(sigma, 0.1)``.

    Args:
        x: Activations, channels first: ``(N, C, ...)``.

    Returns:
        The noisy activations.
    """
    shape = (1, x.shape[1]) + (1,) * (x.ndim - 2)
    mu = torch.empty(shape, dtype=x.dtype, device=x.device).uniform_(-0.5, 0.5)
    sigma = torch.empty(shape, dtype=x.dtype, device=x.device).uniform_(1.0, 1.25)
    shift = torch.empty_like(x).uniform_(-0.1, 0.1) + mu
    scale = torch.randn_like(x) * 0.1 + sigma
    return scale * x + shift


class MomentNoise(Leaf, nn.Module):
    """``moment_noise`` in train mode, the identity in eval mode: the noise for a net without normalization."""

    def forward(self, x: Tensor) -> Tensor:
        """Add the noise in train mode."""
        return moment_noise(x) if self.training else x


class NoisyBatchNorm(Successor, _BatchNorm):
    """Batch normalization with ``moment_noise`` after its affine map in train mode, plain in eval mode.

    State-dict keys are those of ``torch.nn.BatchNorm2d``.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, ...)``.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running averages; None averages all batches equally.
        affine: Learn ``weight`` and ``bias``.
        track_running_stats: Keep running averages; without them evaluation uses the batch too.
        device: Device of parameters and buffers.
        dtype: Their dtype.
    """

    statistics = "batch"
    noisy = True
    carries = ("eps", "momentum", "track_running_stats")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then add the noise in train mode."""
        output = super().forward(input)
        return moment_noise(output) if self.training else output


class NoisyBatchNorm1d(NoisyBatchNorm, nn.BatchNorm1d):
    """Noisy batch normalization (arXiv 1805.11604) of ``(N, C)`` or ``(N, C, L)``; see ``moment_noise``."""


class NoisyBatchNorm2d(NoisyBatchNorm, nn.BatchNorm2d):
    """Noisy batch normalization (arXiv 1805.11604) of ``(N, C, H, W)``; see ``moment_noise``."""


class NoisyBatchNorm3d(NoisyBatchNorm, nn.BatchNorm3d):
    """Noisy batch normalization (arXiv 1805.11604) of ``(N, C, D, H, W)``; see ``moment_noise``."""


METHOD = Method(
    recipes=(
        Recipe(
            "noisy-batch",
            "BatchNorm followed by shifting noise (a control)",
            "Santurkar et al. 2018, arXiv 1805.11604",
            0.1,
            convert=Part("noisy-batch"),
            group="Batch normalization and its relatives",
            ablation=True,
        ),
    ),
    targets={"noisy-batch": layer_target((NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d))},
)
