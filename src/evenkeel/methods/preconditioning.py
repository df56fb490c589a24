"""The mathematics of batch normalization preconditioning (BNP), without state.

Lange, Helfrich, Ye. "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72), 2022,
arXiv 2108.01110.

A layer ``a = b + W h`` sees rows ``h`` with mean ``mu`` and variance ``s`` per feature. With ``P = U D``, where
``U = [[1, -mu^T], [0, I]]`` centres and ``D = diag(1, 1/sqrt(s))`` scales, the Hessian of the loss in ``P^T (b, w)``
is the one a normalized input would have given. Plain gradient descent on those variables is, in ``(b, w)``, gradient
descent with the gradient multiplied by ``P P^T``: this file. Nothing in the network changes.
"""

from math import prod

import torch
from torch import Tensor

SMALLEST_SPREAD = 0.1
"""What a unit's output is taken to spread by at least, in :func:`bounding_factors`."""


def guarded_variance(
    variance: Tensor, eps_relative: float = 1e-2, eps: float = 1e-4, *, largest: Tensor | None = None
) -> Tensor:
    """``s = var + eps_relative max(var) + eps``: no feature gains more than ``1 / eps_relative`` over the widest one.

    Args:
        variance: Variance per input feature of one layer, shape ``(features,)``.
        eps_relative: Guard relative to the largest variance of the layer.
        eps: Absolute guard.
        largest: The largest variance of the layer per feature, when ``variance`` holds several layers in a row.

    Examples:
        >>> guarded_variance(torch.tensor([0.0, 1.0]), eps_relative=0.5, eps=0.25).tolist()
        [0.75, 1.75]
    """
    return variance + eps_relative * (variance.amax() if largest is None else largest) + eps


def step_divisor(fan_in: Tensor | float, positions: Tensor) -> Tensor:
    """``q^2 = max(n / N, 1)``, which keeps steps bounded when there are fewer output positions ``N`` than inputs ``n``.

    The largest eigenvalue of the Gram matrix of ``N`` normalized rows grows as ``(1 + sqrt(n / N))^2``.

    Args:
        fan_in: Inputs of one output unit, ``n`` (for a convolution channels per group times taps).
        positions: Output positions of the whole optimizer step, ``N``, over all micro-batches and ranks.

    Examples:
        >>> step_divisor(8.0, torch.tensor([1.0, 4.0, 100.0])).tolist()
        [8.0, 2.0, 1.0]
    """
    return (fan_in / positions.clamp(min=1)).clamp(min=1)


def update_running(
    mean: Tensor, variance: Tensor, batch_mean: Tensor, batch_variance: Tensor, weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of what was known (share ``1 - weight``) mixed with one step's rows (share ``weight``).

    ``mu <- (1-w) mu + w mu_B`` and ``var <- (1-w) var + w var_B + w (1-w) (mu_B - mu)^2``. The last term is what a
    batch of one row, whose own variance is zero, has to say about the variance.

    Examples:
        >>> zero, two = torch.zeros(1), torch.full((1,), 2.0)
        >>> [t.item() for t in update_running(zero, zero, two, zero, 0.5)]
        [1.0, 1.0]
    """
    delta = batch_mean - mean
    return mean + weight * delta, (1 - weight) * (variance + weight * delta.square()) + weight * batch_variance


def precondition(
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *,
    divisor: Tensor | float = 1.0,
    groups: int = 1,
    transposed: bool = False,
    mean_removed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of a linear or convolution layer multiplied by ``P P^T / q^2``.

    Linear, per input feature, with the new ``W~`` in the second line::

        W~ = (G_W - G_b mu^T) / (q^2 s)
        b~ = G_b / q^2 - W~ mu

    A convolution is the same with ``mu`` and ``s`` per input channel, shared by all taps; a group sees its own
    channels. Without a bias the metric restricted to ``w`` is ``diag(s) + mu mu^T``, and with ``T = G_W / s``, ``v =
    mu / s``::

        W~ = (T - (T mu) v^T / (1 + mu . v)) / q^2

    Args:
        weight_grad: Linear ``(out, in)``; convolution ``(out, in / groups, *kernel)``; transposed convolution
            ``(in, out / groups, *kernel)``.
        bias_grad: ``(out,)``, or None for a layer without a trained bias.
        mean: Mean of the layer's input per feature or channel, ``(in,)``.
        variance: Guarded variance of it, ``(in,)``, positive (see :func:`guarded_variance`).
        divisor: ``q^2`` (see :func:`step_divisor`).
        groups: Groups of the convolution.
        transposed: Whether the weight is laid out as that of a transposed convolution.
        mean_removed: The layer has no bias and what follows it removes the mean of each unit (batch normalization): the
            gradient of the missing bias is zero, so ``W~ = G_W / (q^2 s)`` is exact.

    Returns:
        The preconditioned gradients, shaped as the given ones.

    Raises:
        ValueError: The shapes do not belong to one layer.

    Examples:
        Features with mean 0 and variance 4 are scaled and not centred:

        >>> w, b = precondition(torch.tensor([[8.0, 4.0]]), torch.tensor([1.0]), torch.zeros(2), torch.full((2,), 4.0))
        >>> w.tolist(), b.tolist()
        ([[2.0, 1.0]], [1.0])
    """
    _check(weight_grad, bias_grad, mean, variance, groups, transposed)
    layout = Layout(weight_grad, groups, transposed)
    grouped = layout.grouped(weight_grad)
    mu, scale = layout.along_in(mean), layout.along_in((variance * divisor).reciprocal())
    if bias_grad is not None:
        weight = torch.addcmul(grouped.to(mu.dtype), mu, layout.along_out(bias_grad).to(mu.dtype), value=-1).mul_(scale)
        bias = bias_grad / divisor - layout.per_unit(weight, mu)
        return weight.reshape(weight_grad.shape), bias
    weight = grouped * scale
    if not mean_removed:
        v = mu * scale * divisor
        norm = 1 + (mu * v).sum((1, 2), keepdim=True) * (layout.taps if transposed else 1)
        weight = weight - layout.along_out(layout.per_unit(weight, mu)) / norm * v
    return weight.reshape(weight_grad.shape), None


def unit_changes(
    weight: Tensor,
    grads: tuple[Tensor, Tensor | None],
    preconditioned: tuple[Tensor, Tensor | None],
    variance: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per output unit: how far a step of rate 1 changes its output, and how far its output spreads, both squared.

    Over the rows the layer sees, a step ``-(W~, b~)`` changes the output of unit ``i`` in root mean square by ``|dz_i|``,
    and the output spreads about its mean by ``|z_i|`` (inputs taken as uncorrelated)::

        |dz_i|^2 = (G_W,i . W~_i + G_b,i b~_i) / q^2          |z_i|^2 = sum_c s_c w_ic^2

    The first is free: ``(P P^T)^-1`` is the metric in which outputs change, so no product with the inputs is needed.

    Args:
        weight: The weight, laid out as for :func:`precondition`.
        grads: Gradients of weight and bias (or None).
        preconditioned: What :func:`precondition` made of them.
        variance: Guarded variance of the input, ``(in,)``.
        groups: Groups of the convolution.
        transposed: Whether the weight is laid out as that of a transposed convolution.

    Returns:
        ``q^2 |dz_i|^2`` and ``|z_i|^2``, ``(out,)`` each.

    Examples:
        >>> w, g, s = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> [t.tolist() for t in unit_changes(w, (g, None), (g / s, None), s)]
        [[13.5], [9.0]]
    """
    layout = Layout(weight, groups, transposed)
    change = layout.over_in(layout.grouped(grads[0] * preconditioned[0]))
    if grads[1] is not None and preconditioned[1] is not None:
        change = torch.addcmul(change, grads[1], preconditioned[1])
    squares = layout.grouped(weight.detach().square())
    return change, layout.per_unit(squares, layout.along_in(variance))


def bounding_factors(change: Tensor, spread: Tensor, max_change: float) -> Tensor:
    """``min(1, max_change max(|z|, 0.1) / |dz|)``: no unit's output changes by more than ``max_change`` of its spread.

    A unit that starts at zero is taken to spread by 0.1, so that it can move.

    Args:
        change: ``|dz|^2``, the squared change of each unit's output by the step as it is.
        spread: ``|z|^2``, the squared spread of each unit's output.
        max_change: Largest relative change.

    Examples:
        >>> bounding_factors(torch.tensor([4.0, 4.0, 0.0]), torch.tensor([16.0, 0.0, 1.0]), 0.125).tolist()
        [0.25, 0.0062500000931322575, 1.0]
    """
    allowed = max_change * spread.sqrt().clamp(min=SMALLEST_SPREAD)
    return (allowed / change.clamp(min=1e-30).sqrt()).clamp(max=1)


def scale_units(weight: Tensor, factors: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight-shaped tensor with each output unit multiplied by its factor, ``(out,)``."""
    layout = Layout(weight, groups, transposed)
    return (layout.grouped(weight) * layout.along_out(factors)).reshape(weight.shape)


class Layout:
    """A weight as ``(groups, out, in taps)``, or ``(groups, in, out taps)`` if transposed, and vectors that broadcast to it.

    Taps lie beside the channels, not in a dimension of their own: elementwise loops over three or nine taps are slow.
    """

    def __init__(self, weight: Tensor, groups: int, transposed: bool) -> None:
        self.groups, self.transposed = groups, transposed
        self.taps = prod(weight.shape[2:])

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight-shaped tensor as three dimensions."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def along_in(self, vector: Tensor) -> Tensor:
        """A vector over the inputs."""
        return self._first(vector) if self.transposed else self._second(vector)

    def along_out(self, vector: Tensor) -> Tensor:
        """A vector over the output units."""
        return self._second(vector) if self.transposed else self._first(vector)

    def per_unit(self, grouped: Tensor, along_in: Tensor) -> Tensor:
        """For each output unit the sum over inputs and taps of weight times vector, ``(out,)``."""
        return self.over_in(grouped.to(along_in.dtype) * along_in)

    def over_in(self, grouped: Tensor) -> Tensor:
        """For each output unit the sum over inputs and taps, ``(out,)``."""
        if self.transposed:
            return grouped.sum(1).reshape(-1, self.taps).sum(1)
        return grouped.sum(2).reshape(-1)

    def _first(self, vector: Tensor) -> Tensor:
        return vector.reshape(self.groups, -1, 1)

    def _second(self, vector: Tensor) -> Tensor:
        return (vector if self.taps == 1 else vector.repeat_interleave(self.taps)).reshape(self.groups, 1, -1)


def _check(
    weight_grad: Tensor, bias_grad: Tensor | None, mean: Tensor, variance: Tensor, groups: int, transposed: bool
) -> None:
    first, second = weight_grad.shape[0], prod(weight_grad.shape[1:2])
    ins, outs = (first, second * groups) if transposed else (second * groups, first)
    if weight_grad.dim() < 2 or first % groups or mean.shape != (ins,) or variance.shape != (ins,):
        raise ValueError(
            f"a weight gradient of shape {tuple(weight_grad.shape)} with groups={groups}, transposed={transposed} "
            f"needs mean and variance of shape ({ins},), got {tuple(mean.shape)} and {tuple(variance.shape)}"
        )
    if bias_grad is not None and bias_grad.shape != (outs,):
        raise ValueError(
            f"a weight gradient of shape {tuple(weight_grad.shape)} with groups={groups}, transposed={transposed} "
            f"needs a bias gradient of shape ({outs},), got {tuple(bias_grad.shape)}"
        )
