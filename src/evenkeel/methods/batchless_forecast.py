"""The forecast of batchless normalization: what a step does to the statistics it will be normalized by.

Our own addition to Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729; see docs/batchless.md.

Batch normalization sees the weights' last step in the statistics of the next batch. mu and sigma that trail behind see
it many steps later, and until then each layer passes on, and amplifies, the shift of its predecessor. But for the
linear or convolution layer that feeds a batchless layer, ``x = W h``, the step's own effect is known: with the mean m
and variance s of its inputs, ``mu += (W' - W) m`` and the variance ``*= (W'^2 s) / (W^2 s)`` (inputs taken for
uncorrelated).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from evenkeel.compilation import eager
from evenkeel.graph import producers
from evenkeel.methods.batchless import BatchlessNorm
from evenkeel.methods.observed import row_count
from evenkeel.moments import Moments, Tally, empty, observing, totals


def forecast(old: Tensor, new: Tensor, mean: Tensor, variance: Tensor, *, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Shift of the mean and growth of the variance of ``x = W h`` when W changes and h does not.

    ``shift = (W' - W) m`` and ``growth = (W'^2 s) / (W^2 s)``, squares elementwise; the taps of a convolution share
    the statistics of their input channel.

    Args:
        old: W, ``(out, in / groups, *taps)``.
        new: W', shape of W.
        mean: Mean of h, ``(in,)``.
        variance: Variance of h, ``(in,)``.
        groups: Groups of the convolution.

    Returns:
        ``(shift, growth)``, shape ``(out,)`` each; growth is 1 where W or h does not vary.

    Examples:
        >>> old, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> [t.item() for t in forecast(old, new, torch.tensor([5.0, 3.0]), torch.tensor([1.0, 2.0]))]
        [6.0, 9.0]
    """

    def through(weight: Tensor, statistic: Tensor) -> Tensor:
        per_input = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        if groups == 1:
            return per_input @ statistic
        shared = statistic.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        return (per_input * shared).sum(1)

    old, new = old.to(mean.dtype), new.to(mean.dtype)
    shift = through(new - old, mean)
    growth = through(new.square(), variance) / through(old.square(), variance)
    known = torch.isfinite(growth) & (growth > 0)
    return torch.where(torch.isfinite(shift), shift, 0), torch.where(known, growth, 1)


class Forecaster:
    """A batchless layer, the layer that feeds it, and what the latter's inputs were in this step.

    Args:
        norm: The batchless layer.
        producer: The linear or (not transposed) convolution layer whose output goes there alone.
    """

    def __init__(self, norm: BatchlessNorm, producer: nn.Linear | _ConvNd) -> None:
        self.norm, self.producer = norm, producer
        self.tally = Tally()
        self._before: tuple[Tensor, Moments] | None = None
        self._hook = producer.register_forward_hook(self._see)

    @property
    def features(self) -> int:
        """Input features of the producer."""
        return self.producer.in_channels if isinstance(self.producer, _ConvNd) else self.producer.in_features

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    @eager
    def _see(self, producer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not (self.norm.training and output.requires_grad and observing() and self.norm.is_collected):
            return
        x = args[0]
        total, square = totals(x, 1 if isinstance(producer, _ConvNd) else -1)
        rows = row_count(self.producer, x.shape)  # with the zeros of padding
        count = torch.full((), rows, dtype=total.dtype, device=x.device)
        mean = total / count.clamp(min=1)
        moments = Moments(count, mean, (square - total * mean).clamp(min=0))
        self.tally.offer(moments, output)

    def take(self) -> Moments:
        """Moments of the producer's inputs since the last call, if need be of none."""
        like = self.norm.running_mean
        return self.tally.take() or empty(self.features, dtype=like.dtype, device=like.device)

    def before(self, moments: Moments) -> None:
        """Keep the weight that the optimizer is about to change, and the moments of its inputs in this step."""
        self._before = self.producer.weight.detach().clone(), moments

    @torch.no_grad()
    def after(self) -> None:
        """Move mu and sigma by what the step did."""
        if self._before is None:
            return
        old, moments = self._before
        self._before = None
        groups = getattr(self.producer, "groups", 1)
        shift, growth = forecast(old, self.producer.weight, moments.mean, moments.variance, groups=groups)
        self.norm.set_statistics(self.norm.running_mean + shift, self.norm.running_var * growth)


def forecasters(model: nn.Module) -> list[Forecaster]:
    """One for each projected layer of ``model`` that a linear or convolution layer alone feeds."""
    modules = dict(model.named_modules())
    found = []
    for path, source in producers(model).items():
        norm, producer = modules[path], modules[source]
        if not isinstance(norm, BatchlessNorm) or not norm.projected or isinstance(producer, _ConvTransposeNd):
            continue
        if isinstance(producer, (nn.Linear, _ConvNd)):
            found.append(Forecaster(norm, producer))
    return found
