"""The projected gradient of batchless normalization: batch normalization's backward pass, from earlier steps.

Our own addition to Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729; the derivation and the measurements
are in docs/batchless-projected.md.

With ``n' = dL/dn``, batch normalization passes on ``dL/dx = (n' - A - B n) / sigma``, where ``A = mean(n')`` and
``B = mean(n' n)`` make the result orthogonal to 1 and n over the rows of the batch: no step can be spent on merely
shifting or scaling what the next normalization undoes. The pointwise gradient of the paper lacks both terms. Here A and
B come from the earlier steps, so the backward pass stays per instance, and all that is added over micro-batches and
ranks are sums.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.inspection.counting import disable_dynamo, is_counting
from normkit.methods.batchless.functions import affine_map
from normkit.moments import keep_fp32

GAIN, INSTANCES = 0.1, 4.0  # the share of the newest step: 0.1 from many instances, 0.02 from one


def gain(instances: Tensor) -> Tensor:
    """Share ``0.1 N / (N + 4)`` of a step of N instances in A and B: what few instances say about them is mostly noise.

    Args:
        instances: N, over all micro-batches and ranks.
    """
    return GAIN * instances / (instances + INSTANCES)


def projected_gradient(grad_n: Tensor, n: Tensor, shift: Tensor, slope: Tensor) -> Tensor:
    """``n' - A - B n``: what remains of ``n' = dL/dn`` orthogonal to 1 and n, when A and B are its regression on them.

    Args:
        grad_n: dL/dn, ``(rows, features)``.
        n: Normalized activations, ``(rows, features)``.
        shift: A, ``(features,)``.
        slope: B, ``(features,)``.

    Returns:
        ``(rows, features)``.

    Examples:
        >>> n = torch.tensor([[-1.0], [1.0]])
        >>> projected_gradient(3 + 2 * n, n, torch.tensor([3.0]), torch.tensor([2.0])).tolist()
        [[0.0], [0.0]]
    """
    return grad_n - shift - slope * n


def regression(sum_grad: Tensor, sum_grad_n: Tensor, m1: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of the least-squares fit ``n' ~ A + B n`` over the rows of a step.

    ``B = (mean(n' n) - mean(n') m1) / (m2 - m1^2)``, ``A = mean(n') - B m1``; with m1 = 0 and m2 = 1 these are batch
    normalization's mean(n') and mean(n' n). Sums over the rows give A and B times the number of rows.

    Args:
        sum_grad: Sum of n' (or mean), ``(features,)``.
        sum_grad_n: Sum of n' n (or mean), ``(features,)``.
        m1: Mean of n, ``(features,)``.
        m2: Mean of n^2, ``(features,)``.

    Returns:
        A and B, ``(features,)`` each.
    """
    variance = (m2 - m1.square()).clamp(min=1e-2)
    slope = (sum_grad_n - sum_grad * m1) / variance
    return sum_grad - slope * m1, slope


class GradientControl(nn.Module):
    """A and B of one layer, learned from the steps so far.

    They are kept as sums over the rows of a step, the scale on which a mean loss does not depend on the number of rows.
    Like momentum they belong to the training, not to the function: :func:`normkit.attach` lets them travel in the
    optimizer's state dict, so that the model's is that of batch normalization.
    """

    shift: Tensor
    slope: Tensor
    rows: Tensor

    def __init__(
        self, features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Start with A = B = 0, the paper's gradient."""
        super().__init__()
        for name, start in (
            ("shift", torch.zeros(features)),
            ("slope", torch.zeros(features)),
            ("rows", torch.ones(2)),
        ):
            self.register_buffer(name, start.to(device=device, dtype=dtype), persistent=False)
        self.sums: Tensor | None = None

    def forward(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """:func:`affine_map` with the projected gradient."""
        add = self._add if is_counting() else None
        learned = torch.stack([self.shift, self.slope]), self.rows.max()
        return _projected_affine(x, weight, bias, mean, variance, *learned, eps, add)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None:
                self._buffers[name] = keep_fp32(self.get_buffer(name), old)
        return self

    def _add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> Tensor:
        """The sums over the rows of n' and n' n since the last call, ``(2, features)``."""
        sums, self.sums = self.sums, None
        return self.shift.new_zeros(2, self.shift.numel()) if sums is None else sums


class _ProjectedAffine(torch.autograd.Function):
    """``(x - mu) / sigma * gamma + beta`` whose gradient for ``x`` is projected; channels in dimension 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        sums: Tensor,
        rows: Tensor,
        eps: float,
        add: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, sums, rows)
        ctx.add, ctx.eps, ctx.first = add, eps, True
        return affine_map(x, mean, variance, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight, mean, variance, sums, rows = ctx.saved_tensors
        gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        d_gamma = d_beta = torch.zeros_like(mean)
        if dy.numel():  # of an empty batch the kernel would divide by zero, which ends the process
            _, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(
                dy, x, gamma, mean, variance, None, None, False, ctx.eps, [False, True, True]
            )
        if ctx.add is not None:
            ctx.add(torch.stack([d_beta, d_gamma]).detach() * gamma.detach())
        dx = None
        if ctx.needs_input_grad[0]:
            inverse = (variance + ctx.eps).rsqrt()
            # A and B belong to the sum of all backward passes: they go once
            shift, slope = sums * (inverse / rows if ctx.first else torch.zeros_like(inverse))
            ctx.first = False
            slope = slope * inverse
            terms = torch.stack([slope * mean - shift, slope, gamma * inverse]).to(dy.dtype)
            constant, linear, outer = terms.view(3, -1, *[1] * (x.dim() - 2))
            dx = torch.addcmul(constant, x, linear, value=-1).addcmul_(dy, outer)
        d_gamma, d_beta = (
            d if needed else None for d, needed in zip((d_gamma, d_beta), ctx.needs_input_grad[1:3], strict=True)
        )
        return dx, d_gamma, d_beta, None, None, None, None, None, None


@disable_dynamo
def _projected_affine(*args: Any) -> Tensor:
    return _ProjectedAffine.apply(*args)  # its backward pass adds to sums outside of it
