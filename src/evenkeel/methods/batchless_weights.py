"""The gradient of the weights in front of a batchless layer, without what the normalization undoes.

Our own addition to Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729; see docs/batchless-projected.md.

A and B of :mod:`evenkeel.methods.batchless_projected` come from earlier steps, so what is new in a step's own mean(n')
and mean(n' n), and most of it is, remains in dL/dx. In the gradient of the linear or convolution layer that produces ``x = W h``
it adds up over the rows to something along two known directions: the mean of h, which shifts x, and W, which scales it.
Neither changes the function batch normalization would train. Both are taken out when the step is complete.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from evenkeel.compilation import eager
from evenkeel.graph import producers
from evenkeel.methods.batchless import BatchlessNorm
from evenkeel.moments import Moments, Tally, empty, observing, totals


def projected_weight_gradient(
    grad: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, *, groups: int = 1
) -> Tensor:
    """The gradient of W in ``x = W h`` without its parts that shift and that scale x, per output of W.

    With the mean m and the variance s of h, ``v = sum(m^2 s) / m^2`` the variance of h along m, and per output

        g <- g - m (g m) / (m^2 + v),    g <- g - w (g w) / w^2.

    The constant part of dL/dx contributes ``m^2 / (m^2 + v)`` of the squares of h along m: as much of g goes, nothing of
    it where h is centered. Batch normalization's gradient is orthogonal to w, too; for centered inputs of equal
    variance, uncorrelated, the result *is* batch normalization's gradient. Any scale of g is as good as any other.

    Args:
        grad: g, dL/dW, ``(out, in / groups, *taps)``.
        weight: W, shape of g.
        mean: Mean of h, ``(in,)``; the taps of a convolution share that of their channel.
        variance: Variance of h, ``(in,)``.
        groups: Groups of the convolution.

    Returns:
        Shape and dtype of g; g itself if the statistics of h are not finite.

    Examples:
        >>> grad, weight = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
        >>> projected_weight_gradient(grad, weight, torch.tensor([0.0, 0.0, 3.0]), torch.ones(3))
        tensor([[0.0000, 1.0000, 0.1000]])
    """
    g, w = grad.flatten(1).to(mean.dtype), weight.flatten(1).to(mean.dtype)

    def per_weight(statistic: Tensor) -> Tensor:
        shared = statistic.view(groups, -1).repeat_interleave(g.shape[1] * groups // len(statistic), 1)
        return shared.repeat_interleave(len(g) // groups, 0) if groups > 1 else shared

    def along(direction: Tensor, square: Tensor) -> Tensor:
        return direction * ((g * direction).sum(1, keepdim=True) / square.clamp(min=torch.finfo(g.dtype).tiny))

    m, s = per_weight(mean), per_weight(variance)
    length = m.square().sum(1, keepdim=True)
    spread = (m.square() * s).sum(1, keepdim=True) / length.clamp(min=torch.finfo(g.dtype).tiny)
    g = g - along(m, length + spread)
    g = g - along(w, w.square().sum(1, keepdim=True))
    return torch.where(torch.isfinite(length + spread).all(), g.to(grad.dtype).view_as(grad), grad)


class Producer:
    """The layer that feeds a batchless layer, and the moments of its inputs in this step.

    Args:
        norm: The batchless layer.
        layer: The linear or (not transposed) convolution layer whose output goes there alone.
    """

    def __init__(self, norm: BatchlessNorm, layer: nn.Linear | _ConvNd) -> None:
        self.norm, self.layer = norm, layer
        self.tally = Tally()
        self._own = id(self)  # a copy of the model brings a copy of this along, which has nothing to do
        self._hook = layer.register_forward_hook(self._see, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    @eager
    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not (self.norm.training and output.requires_grad and observing() and self._own == id(self)):
            return
        x = args[0] if args else kwargs["input"]
        total, square = totals(x, 1 if isinstance(layer, _ConvNd) else -1)
        count = torch.full((), x.numel() / len(total), dtype=total.dtype, device=x.device)
        mean = total / count.clamp(min=1)
        self.tally.offer(Moments(count, mean, (square - total * mean).clamp(min=0)), output)

    def take(self) -> Moments:
        """Moments of the layer's inputs since the last call, if need be of none."""
        like = self.norm.running_mean
        features = self.layer.in_channels if isinstance(self.layer, _ConvNd) else self.layer.in_features
        return self.tally.take() or empty(features, dtype=like.dtype, device=like.device)

    def project(self, moments: Moments) -> None:
        """Replace the gradient of the weight, if there is one, by the projected one.

        Args:
            moments: Of the layer's inputs in this step, over all ranks.
        """
        weight = self.layer._parameters.get("weight")  # by now it may be computed from other parameters
        if weight is not None and weight.grad is not None:
            groups = getattr(self.layer, "groups", 1)
            weight.grad.copy_(
                projected_weight_gradient(weight.grad, weight.detach(), moments.mean, moments.variance, groups=groups)
            )


def weight_producers(model: nn.Module) -> list[Producer]:
    """One for each projected layer of ``model`` that a linear or convolution layer alone feeds.

    The weight must be a parameter of that layer alone: what another layer does with it may depend on its scale, and what it is
    computed from has gradients of its own.
    """
    modules = dict(model.named_modules())
    holders = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    pairs = ((modules[norm], modules[source]) for norm, source in producers(model).items())
    return [
        Producer(norm, layer)
        for norm, layer in pairs
        if isinstance(norm, BatchlessNorm)
        and norm.projected
        and isinstance(layer, (nn.Linear, _ConvNd))
        and not isinstance(layer, _ConvTransposeNd)
        and holders[id(layer._parameters.get("weight"))] == 1
    ]
