"""The mathematics of batch normalization preconditioning (BNP), without state.

Lange, Helfrich, Ye. "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72), 2022,
arXiv 2108.01110.

A layer ``a = b + W h`` sees rows ``h`` with mean ``mu`` and variance ``s`` per feature. With ``P = U D``, where
``U = [[1, -mu^T], [0, I]]`` centres and ``D = diag(1, 1/sqrt(s))`` scales, the Hessian of the loss in ``P^T (b, w)``
is the one a normalized input would have given. Plain gradient descent on those variables is, in ``(b, w)``, gradient
descent with the gradient multiplied by ``P P^T``: this file. Nothing in the network changes.
"""

from math import prod

from torch import Tensor

SMALLEST_SPREAD = 0.1


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
        >>> import torch
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
        >>> import torch
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
        >>> import torch
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

        >>> import torch
        >>> w, b = precondition(torch.tensor([[8.0, 4.0]]), torch.tensor([1.0]), torch.zeros(2), torch.full((2,), 4.0))
        >>> w.tolist(), b.tolist()
        ([[2.0, 1.0]], [1.0])
    """
    _check(weight_grad, bias_grad, mean, variance, groups, transposed)
    # (groups, out, in, taps) or, transposed, (groups, in, out, taps): views, so that every layer is one formula
    grouped = weight_grad.reshape(groups, weight_grad.shape[0] // groups, weight_grad.shape[1], -1)
    ins = (1, 3) if transposed else (2, 3)
    per_in = (groups, -1, 1, 1) if transposed else (groups, 1, -1, 1)
    per_out = (groups, 1, -1, 1) if transposed else (groups, -1, 1, 1)
    mu, s = mean.reshape(per_in), variance.reshape(per_in)
    if bias_grad is not None:
        weight = (grouped - mu * bias_grad.reshape(per_out)) / (divisor * s)
        bias = bias_grad / divisor - (weight * mu).sum(ins).reshape(-1)
        return weight.reshape(weight_grad.shape), bias
    weight = grouped / s
    if not mean_removed:
        v = mu / s
        taps = grouped.shape[3]
        share = (weight * mu).sum(ins, keepdim=True) / (1 + taps * (mu * v).sum(ins, keepdim=True))
        weight = weight - share * v
    return (weight / divisor).reshape(weight_grad.shape), None


def bounded_step(
    weight: Tensor,
    grads: tuple[Tensor, Tensor | None],
    preconditioned: tuple[Tensor, Tensor | None],
    variance: Tensor,
    *,
    rate: Tensor | float,
    max_change: float,
    divisor: Tensor | float = 1.0,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Factor per output unit, so that no step changes its output by more than ``max_change`` of the output's spread.

    A step ``-rate (W~, b~)`` changes the output of unit ``i``, over the rows it sees, by ``|dz_i|`` in root mean
    square::

        |dz_i|^2 = rate^2 (G_W,i . W~_i + G_b,i b~_i) / q^2

    which the preconditioned gradient gives for nothing: the metric of the step is ``(P P^T)^-1``. The spread of the
    output is ``|z_i|``, ``|z_i|^2 = sum_c s_c w_ic^2`` (inputs taken as uncorrelated), at least 0.1 so that a unit
    that starts at zero can move. The factor is ``min(1, max_change max(|z_i|, 0.1) / |dz_i|)``.

    Args:
        weight: The weight, laid out as for :func:`precondition`.
        grads: Gradients of weight and bias (or None).
        preconditioned: What :func:`precondition` made of them.
        variance: Guarded variance of the input, ``(in,)``.
        rate: Learning rate, over ``1 - momentum`` where there is momentum: how far a lasting gradient carries.
        max_change: Largest relative change of a unit's output.
        divisor: ``q^2``.
        groups: Groups of the convolution.
        transposed: Whether the weight is laid out as that of a transposed convolution.

    Returns:
        Factors in (0, 1], ``(out,)``.

    Examples:
        A unit with spread 1 whose step would move it by 1 is allowed a tenth of that:

        >>> import torch
        >>> w, g, s = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.ones(1)
        >>> bounded_step(w, (g, None), (g, None), s, rate=0.5, max_change=0.1).tolist()
        [0.10000000149011612]
    """
    view = (groups, weight.shape[0] // groups, weight.shape[1], -1)
    ins = (1, 3) if transposed else (2, 3)
    s = variance.reshape((groups, -1, 1, 1) if transposed else (groups, 1, -1, 1))
    change = (grads[0] * preconditioned[0]).reshape(view).sum(ins).reshape(-1)
    if grads[1] is not None and preconditioned[1] is not None:
        change = change + grads[1] * preconditioned[1]
    spread = (weight.detach().square().reshape(view) * s).sum(ins).reshape(-1)
    change = rate * (change.clamp(min=0) / divisor).sqrt()
    return (max_change * spread.sqrt().clamp(min=SMALLEST_SPREAD) / change.clamp(min=1e-30)).clamp(max=1)


def scale_units(weight: Tensor, factors: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """The weight-shaped tensor with each output unit multiplied by its factor, ``(out,)``."""
    view = (groups, weight.shape[0] // groups, weight.shape[1], -1)
    per_out = (groups, 1, -1, 1) if transposed else (groups, -1, 1, 1)
    return (weight.reshape(view) * factors.reshape(per_out)).reshape(weight.shape)


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
