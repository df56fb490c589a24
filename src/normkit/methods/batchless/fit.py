"""Fit batchless layers to the rows of one step.

Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729: the natural gradient in closed form, for all layers in the
same few operations (a layer has a few dozen numbers to move: launched one layer at a time, that would take longer than a
small network's own operations), and the plain gradient for the model's optimizer.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from normkit.methods.batchless import c_kernel
from normkit.methods.batchless.functions import gaussian_nll_gradients, per_feature
from normkit.methods.batchless.layer import BatchlessNorm
from normkit.moments import Moments, finite

SMALLEST_INVERSE = 1e-8  # of sigma: a step that carries 1 / sigma to 0 leaves something to return by
RATE, INSTANCES = 0.07, 6.0  # mu and sigma are running means of weight 0.07 from many instances, 0.01 from one


def fit(layers: list[BatchlessNorm], moments: list[Moments], instances: list[Tensor | float]) -> "Fit | KernelFit":
    """Fit the layers, by the kernel where it can; arguments as for :class:`Fit`."""
    tensors: list[Any] = []
    for layer, rows in zip(layers, moments, strict=True):
        own = layer._parameters  # attributes of modules are found slowly
        tensors += (own["running_mean"], own["running_var"], *rows)
    if c_kernel.fits(tensors):
        return KernelFit(layers, moments, tensors, instances)
    like = layers[0].running_mean.detach()
    return Fit(layers, moments, [n if isinstance(n, Tensor) else like.new_full((), n) for n in instances])


class KernelFit:
    """As :class:`Fit`, by the kernel for CPUs.

    Args:
        layers: Layers of one dtype and one eps.
        moments: Of the rows that each layer saw since the last step.
        tensors: What the kernel works with, see ``c_kernel.fit_``.
        instances: How many instances the rows belong to, for each layer.
    """

    def __init__(
        self,
        layers: list[BatchlessNorm],
        moments: list[Moments],
        tensors: list[Tensor],
        instances: list[Tensor | float],
    ) -> None:
        self.layers, self.moments = layers, moments
        self._tensors, self._instances = tensors, instances

    def _fit(self, rate: float) -> list[float]:
        sizes, eps = [layer.num_features for layer in self.layers], self.layers[0].eps
        return c_kernel.fit_(sizes, self._tensors, self._instances, eps=eps, rate=rate, damping=INSTANCES)

    @cached_property
    def variance_ratio(self) -> Sequence[float]:
        """E n^2 of each layer before the step, mean over its channels; 1 where nothing is known."""
        return self._fit(0.0)

    @property
    def projected(self) -> bool:
        """Whether the weight gradients of the layers that feed these are projected."""
        return self.layers[0].projected

    @property
    def largest_variance_ratio(self) -> float:
        """E n^2 of the layer that is fitted worst."""
        return max(self.variance_ratio)

    def natural_gradient_step(self, rate: float) -> None:
        """Step mu and sigma along the natural gradient."""
        self.variance_ratio = self._fit(rate)


class Fit:
    """The fit of the layers' Gaussians to the rows of a step, per feature of all layers together.

    Rows with anything that is not finite in them, in any of the layers, count for nothing.

    Args:
        layers: Layers on one device, of one dtype and one eps.
        moments: Of the rows that each layer saw since the last step, over all ranks.
        instances: How many instances they belong to, for each layer, ``()``.
    """

    def __init__(self, layers: list[BatchlessNorm], moments: list[Moments], instances: list[Tensor]) -> None:
        self.layers, self.moments = layers, moments
        self.sizes = [layer.num_features for layer in layers]
        self.mean = torch.cat([layer.running_mean for layer in layers])
        self.variance = torch.cat([layer.running_var for layer in layers])
        self.seen = torch.cat([m.mean for m in moments])
        self.rows = per_feature([m.count for m in moments], self.sizes)
        self.instances = per_feature(instances, self.sizes)
        deviation = self.seen - self.mean
        variance = torch.cat([m.m2 for m in moments]) / self.rows.clamp(min=1)
        self.about = variance + deviation.square()  # E (x - mu)^2
        self.valid = (self.rows > 0) & torch.isfinite(self.about.sum())
        scale = (self.variance + layers[0].eps).rsqrt()
        self.m1, self.m2 = deviation * scale, self.about * scale.square()
        self.variance_ratio = torch.stack([
            part.mean() for part in torch.where(self.valid, self.m2, 1).split(self.sizes)
        ])
        """E n^2 of each layer, mean over its channels; 1 where nothing is known."""

    @property
    def largest_variance_ratio(self) -> Tensor:
        """E n^2 of the layer that is fitted worst, ``()``."""
        return self.variance_ratio.max()

    @property
    def projected(self) -> bool:
        """Whether the weight gradients of the layers that feed these are projected."""
        return self.layers[0].projected

    def natural_gradient_step(self, rate: float) -> None:
        """Step mu and sigma along the natural gradient, at ``eta = rate N / (N + 6)`` for N instances.

        ``mu += eta (E x - mu)``, ``sigma^2 += eta (E (x - mu)^2 + eps - sigma^2)``: for sigma the gradient's step to
        first order, but the exact running second moment about mu, so that no rate up to 1 and no misfit, however large,
        overshoots. Few instances say little about the two: at a fixed rate, steps of one would follow its noise.
        """
        eta = rate * self.instances / (self.instances + INSTANCES)
        mean, variance = self.mean.lerp(self.seen, eta), self.variance.lerp(self.about, eta)
        self._write([layer.running_mean for layer in self.layers], torch.where(self.valid, mean, self.mean))
        self._write([layer.running_var for layer in self.layers], torch.where(self.valid, variance, self.variance))

    def _write(self, targets: list[Tensor], values: Tensor) -> None:
        torch._foreach_copy_(targets, list(values.split(self.sizes)))


class LikelihoodParameters:
    """The parameters of a layer that the optimizer trains with the plain gradient: mu, and log sigma, sigma or 1 / sigma.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: BatchlessNorm) -> None:
        self.layer = layer
        self.rho = nn.Parameter(layer.sigma, requires_grad=False)

    def parameters(self) -> list[nn.Parameter]:
        """Return the mean, and rho."""
        return [self.layer.running_mean, self.rho]

    def before(self, moments: Moments, scale: Tensor | float = 1.0) -> None:
        """Write the gradients of the likelihood, times what the optimizer will divide by."""
        layer, sigma, moments = self.layer, self.layer.sigma, finite(moments)
        d_mean, d_log = gaussian_nll_gradients(moments, layer.running_mean, sigma, gradient="plain", eps=layer.eps)
        self.rho.data, d_rho = {
            "log": (sigma.log(), d_log),
            "abs": (sigma, d_log / sigma),
            "inv": (1 / sigma, -d_log * sigma),
        }[layer.scale]
        seen = moments.count > 0
        layer.running_mean.grad, self.rho.grad = (torch.where(seen, d, 0) * scale for d in (d_mean, d_rho))

    @torch.no_grad()
    def after(self) -> None:
        """Set sigma from the trained rho; it stays at sqrt(eps) or above."""
        sigma = {"log": self.rho.exp(), "abs": self.rho, "inv": 1 / self.rho.abs().clamp(min=SMALLEST_INVERSE)}[
            self.layer.scale
        ]
        self.layer.running_var.copy_((sigma.square() - self.layer.eps).clamp(min=0))
        self.layer.running_mean.grad = self.rho.grad = None
