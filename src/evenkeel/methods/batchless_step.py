"""What batchless layers learn from one step.

Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729: the natural gradient in closed form, for all layers in the
same few operations (a layer has a few dozen numbers to move: launched one layer at a time, that would take longer than a
small network's own operations), and the plain gradient for the model's optimizer.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

import torch
from torch import Tensor, nn

from evenkeel.methods.batchless import BatchlessNorm
from evenkeel.methods.batchless_functions import gaussian_nll_gradients
from evenkeel.methods.batchless_projected import gain, regression
from evenkeel.moments import Moments, finite

RATE, INSTANCES = 0.07, 6.0  # mu and sigma are running means of weight 0.07 from many instances, 0.01 from one


class Fit:
    """How the rows of a step lie in the layers' Gaussians, per feature of all layers together.

    Rows with anything that is not finite in them, in any of the layers, count for nothing.

    Args:
        layers: Layers on one device and of one dtype.
        moments: Of the rows that each layer saw since the last step, over all ranks.
        instances: How many instances they belong to, for each layer.
    """

    def __init__(self, layers: list[BatchlessNorm], moments: list[Moments], instances: list[Tensor]) -> None:
        self.layers, self.moments = layers, moments
        self.sizes = [layer.num_features for layer in layers]
        self.mean = torch.cat([layer.running_mean for layer in layers])
        self.variance = torch.cat([layer.running_var for layer in layers])
        self.seen = torch.cat([m.mean for m in moments])
        self.rows = self._spread([m.count for m in moments])
        self.instances = self._spread(instances)
        deviation = self.seen - self.mean
        spread = torch.cat([m.m2 for m in moments]) / self.rows.clamp(min=1)
        self.about = spread + deviation.square()  # E (x - mu)^2
        self.valid = (self.rows > 0) & torch.isfinite(self.about.sum())
        scale = torch.cat([(layer.running_var + layer.eps).rsqrt() for layer in layers])
        self.m1, self.m2 = deviation * scale, self.about * scale.square()

    def _spread(self, per_layer: list[Tensor]) -> Tensor:
        return torch.cat([t.expand(n) for t, n in zip(per_layer, self.sizes, strict=True)])

    def note_mismatch(self) -> None:
        """Write every layer's ``mismatch``."""
        excess = (torch.where(self.valid, self.m2, 1) - 1) / 2
        for layer, part in zip(self.layers, excess.split(self.sizes), strict=True):
            layer.mismatch = part.mean()

    def follow(self, rate: float) -> None:
        """Step mu and sigma along the natural gradient, at ``eta = rate N / (N + 6)`` for N instances.

        ``mu += eta (E x - mu)``, ``sigma^2 += eta (E (x - mu)^2 + eps - sigma^2)``: for sigma the gradient's step to
        first order, but the exact running second moment about mu, so that no rate up to 1 and no misfit, however large,
        overshoots. Few instances say little about the two: at a fixed rate, steps of one would follow its noise.
        """
        eta = rate * self.instances / (self.instances + INSTANCES)
        mean, variance = self.mean.lerp(self.seen, eta), self.variance.lerp(self.about, eta)
        self._write([layer.running_mean for layer in self.layers], torch.where(self.valid, mean, self.mean))
        self._write([layer.running_var for layer in self.layers], torch.where(self.valid, variance, self.variance))

    def project(self, products: list[Moments], ranks: int) -> None:
        """Move A and B towards the regression over the rows of this step.

        Args:
            products: Moments of (n', n' n) over all ranks, one of each layer; empty for layers without projection.
            ranks: Over which a mean loss was averaged.
        """
        controls = [layer.control for layer in self.layers if layer.control is not None]
        if not controls:
            return
        rows = self.rows / ranks
        sum_grad, sum_grad_n = torch.cat([m.mean.view(2, -1) for m in products], 1) * rows
        old = torch.stack([torch.cat([c.shift for c in controls]), torch.cat([c.slope for c in controls])])
        new = torch.stack(regression(sum_grad, sum_grad_n, self.m1, self.m2))
        valid = self.valid & torch.isfinite(new.sum())
        shift, slope = torch.where(valid, old.lerp(new, gain(self.instances)), old)
        self._write([c.shift for c in controls], shift)
        self._write([c.slope for c in controls], slope)
        last = torch.stack([m.count / ranks for m in products])
        for control, count, counts in zip(controls, last, valid.split(self.sizes), strict=True):
            known = torch.stack([count, control.rows[0]])
            control.rows.copy_(torch.where(counts[0], known, control.rows))

    def _write(self, targets: list[Tensor], values: Tensor) -> None:
        torch._foreach_copy_(targets, list(values.split(self.sizes)))


class Plain:
    """What the model's optimizer trains of a layer with the plain gradient: mu, and log sigma or sigma.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: BatchlessNorm) -> None:
        self.layer = layer
        self.rho = nn.Parameter(layer.sigma, requires_grad=False)

    def parameters(self) -> list[nn.Parameter]:
        """The mean, and rho."""
        return [self.layer.running_mean, self.rho]

    def before(self, moments: Moments) -> None:
        """Write the gradients of the likelihood."""
        layer, sigma, moments = self.layer, self.layer.sigma, finite(moments)
        d_mean, d_log = gaussian_nll_gradients(moments, layer.running_mean, sigma, gradient="plain", eps=layer.eps)
        self.rho.data = sigma.log() if layer.scale == "log" else sigma
        d_rho = d_log if layer.scale == "log" else d_log / sigma
        seen = moments.count > 0
        layer.running_mean.grad, self.rho.grad = torch.where(seen, d_mean, 0), torch.where(seen, d_rho, 0)

    @torch.no_grad()
    def after(self) -> None:
        """Take over what the optimizer made of rho; sigma stays at sqrt(eps) or above."""
        sigma = self.rho.exp() if self.layer.scale == "log" else self.rho
        self.layer.running_var.copy_((sigma.square() - self.layer.eps).clamp(min=0))
        self.layer.running_mean.grad = self.rho.grad = None
