"""The mathematics of batch normalization preconditioning (BNP), without state.

Lange, Helfrich, Ye. "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72), 2022,
arXiv 2108.01110.

A layer ``a = b + W h`` sees rows ``h`` with mean ``mu`` and variance ``s`` per feature. With ``P = U D``, where
``U = [[1, -mu^T], [0, I]]`` centres and ``D = diag(1, 1/sqrt(s))`` scales, the Hessian of the loss in ``P^T (b, w)``
is the one a normalized input would have given. Plain gradient descent on those variables is, in ``(b, w)``, gradient
descent with the gradient multiplied by ``P P^T``: this file. Nothing in the network changes.
"""

import torch
from torch import Tensor

from normkit.optim.weight_rows import Layout

SMALLEST_SPREAD = 0.1
"""What a unit's output is taken to spread by at least, in [`normkit.functional.bounding_factors`][]."""


def guarded_variance(
    variance: Tensor, eps_relative: float = 1e-2, eps: float = 1e-4, *, largest: Tensor | None = None
) -> Tensor:
    """Return ``s = var + eps_relative max(var) + eps``: no feature gains more than ``1 / eps_relative`` over the widest one.

    Args:
        variance: Variance per input feature of one layer, shape ``(features,)``.
        eps_relative: Guard relative to the largest variance of the layer.
        eps: Absolute guard.
        largest: The largest variance of the layer per feature, when ``variance`` holds several layers in a row.

    Examples:
        >>> guarded_variance(torch.tensor([0.0, 1.0]), eps_relative=0.5, eps=0.25).tolist()
        [0.75, 1.75]
    """
    return torch.add(variance, variance.amax() if largest is None else largest, alpha=eps_relative) + eps


def step_divisor(fan_in: Tensor | float, positions: Tensor) -> Tensor:
    """Return ``q^2 = max(n / N, 1)``, which keeps steps bounded when there are fewer output positions ``N`` than inputs ``n``.

    The largest eigenvalue of the Gram matrix of ``N`` normalized rows grows as ``(1 + sqrt(n / N))^2``.

    Args:
        fan_in: Inputs of one output unit, ``n`` (for a convolution channels per group times kernel positions).
        positions: Output positions of the whole optimizer step, ``N``, over all micro-batches and ranks.

    Examples:
        >>> step_divisor(8.0, torch.tensor([1.0, 4.0, 100.0])).tolist()
        [8.0, 2.0, 1.0]
    """
    return (fan_in / positions.clamp(min=1)).clamp(min=1)


def update_running(
    mean: Tensor,
    variance: Tensor,
    batch_mean: Tensor,
    batch_variance: Tensor,
    weight: Tensor | float,
    *,
    pooled: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mix the mean and variance so far (share ``1 - weight``) with those of one step's rows (share ``weight``).

    ``mu <- (1-w) mu + w mu_B`` and ``var <- (1-w) var + w var_B + w (1-w) (mu_B - mu)^2``. The last term is
    the variance between steps; the rows of a step of one sample have none of their own.

    Args:
        mean: Running mean, ``(in,)``.
        variance: Running variance, ``(in,)``.
        batch_mean: Mean of the step's rows, ``(in,)``.
        batch_variance: Their variance without Bessel's correction, ``(in,)``.
        weight: Share of the step's rows, in [0, 1].
        pooled: Whether the last term is there; without it the running variance is a mean of variances within batches.

    Returns:
        The new running mean and variance.

    Examples:
        >>> zero, two = torch.zeros(1), torch.full((1,), 2.0)
        >>> [t.item() for t in update_running(zero, zero, two, zero, 0.5)]
        [1.0, 1.0]
    """
    delta = batch_mean - mean
    moved = weight * delta
    within = torch.addcmul(variance, moved, delta) if pooled else variance
    return mean + moved, within + weight * (batch_variance - within)


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
    """Multiply the gradient of a linear or convolution layer by ``P P^T / q^2``.

    Linear, per input feature, with the new ``W~`` in the second line::

        W~ = (G_W - G_b mu^T) / (q^2 s)
        b~ = G_b / q^2 - W~ mu

    A convolution is the same with ``mu`` and ``s`` per input channel, shared by all kernel positions; a group sees its own
    channels. Without a bias the metric restricted to ``w`` is ``diag(s) + mu mu^T``, and the step is the first line with
    the gradient that centring implies for the missing bias::

        G_b = (G_W . mu / s) / (1 + mu . mu / s)

    In training ``normkit.methods.bnp.transform`` computes it for all layers of one shape together, with the same ``into_z_`` and
    ``out_of_z_``; a test holds that to this function over 100 steps.

    Args:
        weight_grad: Linear ``(out, in)``; convolution ``(out, in / groups, *kernel)``; transposed convolution
            ``(in, out / groups, *kernel)``.
        bias_grad: ``(out,)``, or None for a layer without a trained bias.
        mean: Mean of the layer's input per feature or channel, ``(in,)``.
        variance: Guarded variance of it, ``(in,)``, positive (see [`normkit.functional.guarded_variance`][]).
        divisor: ``q^2`` (see [`normkit.functional.step_divisor`][]).
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
    layout = Layout(weight_grad.shape, groups, transposed)
    _check(weight_grad, bias_grad, mean, variance, layout)
    rows = layout.rows(weight_grad.to(mean.dtype, copy=True))
    mu, scale = layout.along_in(mean), layout.along_in(variance.rsqrt())
    if bias_grad is not None:
        bias = layout.units(bias_grad.to(mean.dtype, copy=True))
        weight, bias = out_of_z_(into_z_(rows, bias, mu, scale), bias, mu, scale)
        return layout.weight(weight) / divisor, bias.reshape(-1) / divisor
    implied = None if mean_removed else implied_bias_grad(rows, mu, scale)
    return layout.weight(into_z_(rows, implied, mu, scale).mul_(scale)) / divisor, None


def implied_bias_grad(weight: Tensor, mean: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the gradient that centring implies for the bias of a layer without one.

    It is the ``G_b`` with which :func:`into_z_` centres as the metric ``diag(s) + mu mu^T`` does. With ``v = mu / sigma``::

        G_b = (G_W / sigma) . v / (1 + |v|^2)

    Args:
        weight: Rows of ``G_W`` (see ``Layout``), ``(groups, out, in)``.
        mean: ``(groups, 1, in)``.
        scale: ``1 / sigma``, likewise.
        out: Where to write it.

    Returns:
        ``(groups, out, 1)``.
    """
    v = mean * scale
    return torch.bmm(weight, (v * scale / (1 + v.square().sum(-1, keepdim=True))).mT, out=out)


def into_z_(weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """``P^T``: gradients of weights and biases become those of ``z``, the weights that normalized inputs would have.

    In ``a = beta + z . (h - mu) / sigma``, whose gradient in ``beta`` is ``G_b``::

        G_z = (G_W - G_b mu^T) / sigma

    Args:
        weight: Rows of ``G_W`` (see ``Layout``), ``(groups, out, in)``; overwritten.
        bias: ``G_b``, ``(groups, out, 1)``; without a bias what :func:`implied_bias_grad` returns, or None where what follows
            the layer removes the mean of each unit.
        mean: ``(groups, 1, in)``.
        scale: ``1 / sigma``, ``(groups, 1, in)``, for the square root sigma of the guarded variance: products take less
            time than quotients.

    Returns:
        ``G_z``, in the memory of ``weight``.
    """
    return (weight if bias is None else weight.addcmul_(bias, mean, value=-1)).mul_(scale)


def out_of_z_(z: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``P``: a step of ``z`` and ``beta`` as one of weight and bias; arguments as for ``into_z_``.

    ::

        W = z / sigma
        b = beta - W mu

    Returns:
        Weight, in the memory of ``z``, and bias, in the memory of ``bias``.
    """
    weight = z.mul_(scale)
    return weight, bias.baddbmm_(weight, mean.mT, alpha=-1)


def unit_changes(z: Tensor, bias: Tensor | None, weight: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per output unit, how far a step of rate 1 changes its output, and how far its output spreads.

    Over the rows the layer sees, whose normalized inputs are taken as uncorrelated, a step ``-P (G_b, G_z)`` changes the
    output of unit ``i`` in root mean square by ``|dz_i|``, and the output spreads about its mean by ``|z_i|``::

        |dz_i|^2 = |G_z,i|^2 + G_b,i^2 = G_W,i . W~_i + G_b,i b~_i          |z_i|^2 = sum_c s_c w_ic^2

    Args:
        z: ``G_z = (G_W - G_b mu^T) / sigma``, one row per unit, ``(groups, out, in)``.
        bias: ``G_b``, ``(groups, out, 1)``, of a layer without a bias the one that centring implies, or None.
        weight: The weight, likewise.
        sigma: Square root of the guarded variance, ``(groups, 1, in)``.

    Returns:
        ``|dz|`` and ``|z|``, ``(groups, out, 1)`` each.

    Examples:
        >>> z, b, w = torch.tensor([[[1.5, 2.0]]]), torch.tensor([[[6.0]]]), torch.tensor([[[1.5, 2.0]]])
        >>> [t.item() for t in unit_changes(z, b, w, torch.tensor([[[2.0, 2.0]]]))]
        [6.5, 5.0]
    """
    change, spread = lengths_of_units(z, weight, sigma)
    return change if bias is None else torch.hypot(change, bias), spread


def lengths_of_units(
    z: Tensor, weight: Tensor, sigma: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``|G_z|`` and ``|w sigma|`` of each unit; arguments as for ``unit_changes``, and where to write the two."""
    change, spread = out or (None, None)
    return (
        torch.linalg.vector_norm(z, dim=-1, keepdim=True, out=change),
        torch.linalg.vector_norm(weight * sigma, dim=-1, keepdim=True, out=spread),
    )


def bounding_factors(change: Tensor, spread: Tensor, max_change: float) -> Tensor:
    """Return ``min(1, max_change max(|z|, 0.1) / |dz|)``: no unit's output changes by more than ``max_change`` of its spread.

    A unit that starts at zero is taken to spread by 0.1, so that it can move.

    Args:
        change: ``|dz|``, the change of each unit's output by the step as it is.
        spread: ``|z|``, the spread of each unit's output.
        max_change: Largest relative change.

    Examples:
        >>> bounding_factors(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([4.0, 0.0, 1.0]), 0.125).tolist()
        [0.25, 0.0062500000931322575, 1.0]
    """
    return (max_change * spread.clamp(min=SMALLEST_SPREAD) / change.clamp(min=1e-15)).clamp(max=1)


def _check(weight_grad: Tensor, bias_grad: Tensor | None, mean: Tensor, variance: Tensor, layout: Layout) -> None:
    ins, outs = layout.groups * layout.ins, layout.groups * layout.outs
    of = f"a weight gradient of shape {layout.shape} with groups={layout.groups}, transposed={layout.transposed}"
    if weight_grad.dim() < 2 or layout.shape[0] % layout.groups or mean.shape != (ins,) or variance.shape != (ins,):
        raise ValueError(
            f"{of} needs mean and variance of shape ({ins},), got {tuple(mean.shape)} and {tuple(variance.shape)}"
        )
    if bias_grad is not None and bias_grad.shape != (outs,):
        raise ValueError(f"{of} needs a bias gradient of shape ({outs},), got {tuple(bias_grad.shape)}")
