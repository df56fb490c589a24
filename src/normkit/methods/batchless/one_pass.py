"""A batchless layer (arXiv 2212.14729) whose forward and backward pass each read their tensors once, by kernels.

Mean and deviation are known before a batch comes. So one pass writes ``y = gamma n + beta`` and sums the moments of x, and one
writes dx and sums d gamma and d beta. Batch normalization needs two passes in each direction: mean and variance, and the two
means in its gradient, are needed for the first element it writes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.methods.batchless import c_kernel
from normkit.methods.kernels import choice
from normkit.methods.kernels.choice import kernels
from normkit.methods.kernels.rows import rows_of
from normkit.moments import Moments

few = 1 << 15
"""Elements of an activation on a CPU up to which an autograd function in Python costs more than its kernels save."""


class Kernel(NamedTuple):
    """The two passes, for inputs of one layout.

    Attributes:
        forward: ``forward(x, layout, mean, variance, weight, bias, eps)`` returns output and moments of the rows.
        backward: ``backward(dy, x, layout, mean, variance, weight, eps, needs_dx=...)`` returns dx, d gamma and d beta.
        layout: What both need to know of the memory of ``x``.
    """

    forward: Callable[..., tuple[Tensor, Moments]]
    backward: Callable[..., tuple[Tensor | None, Tensor, Tensor]]
    layout: Any


def kernel_for(x: Tensor, *of_channels: Tensor) -> Kernel | None:
    """Return the kernel for an input and vectors over its channels, mu first; None where none can run."""
    mean = of_channels[0]
    kind = kernels(x, *of_channels)
    if kind == "c" and (layout := c_kernel.layout_of(x, *of_channels)) is not None:
        return Kernel(c_kernel.affine_with_moments, c_kernel.affine_gradients, layout)
    if kind == "triton" and mean.dtype == torch.float32 and (rows := rows_of(x, 1)) is not None:
        from normkit.methods.batchless import triton_kernel

        return Kernel(triton_kernel.affine_with_moments, triton_kernel.affine_gradients, rows)
    return None


def one_pass(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments] | None:
    """``affine_map`` and ``moments_about`` by one kernel, and their gradients by another; None where none can run or is worth it.

    Args:
        x: ``(N, C, ...)``.
        mean: mu, ``(C,)``.
        variance: ``sigma^2 - eps``, ``(C,)``.
        weight: gamma ``(C,)`` or None.
        bias: beta ``(C,)`` or None.
        eps: Added to the variance.

    Returns:
        Output, in shape and dtype of ``x``, and moments of C features.
    """
    if x.is_cpu and x.numel() <= few and choice.chosen != "triton":
        return None
    affine = [t for t in (weight, bias) if t is not None]
    kernel = kernel_for(x, mean, variance, *affine) if len(affine) != 1 else None
    if kernel is None:
        return None
    seen: list[Moments] = []
    y = OnePass.apply(x, weight, bias, mean, variance, kernel, eps, seen)
    return y, seen[0]  # pyright: ignore[reportReturnType]


class OnePass(torch.autograd.Function):
    """Output of a layer, with d gamma and d beta from one pass in the backward; mu and sigma are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        kernel: Kernel,
        eps: float,
        seen: list[Moments],
    ) -> Tensor:
        """Return the output, and add the moments of the rows to ``seen``."""
        y, moments = kernel.forward(x, kernel.layout, mean, variance, weight, bias, eps)
        seen.append(moments)
        ctx.save_for_backward(None if weight is None else x, weight, mean, variance)
        ctx.kernel, ctx.eps = kernel, eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, gamma and beta."""
        x, weight, mean, variance = ctx.saved_tensors
        (dy,), needs = grads, ctx.needs_input_grad
        if weight is None:
            scale = (variance + ctx.eps).rsqrt().to(dy.dtype)
            found: tuple[Tensor | None, ...] = dy * scale.view(-1, *[1] * (dy.dim() - 2)), None, None
        elif torch.is_grad_enabled():  # gradients of gradients: the readable code, which autograd follows
            shape = (-1, *[1] * (dy.dim() - 2))
            others = [d for d in range(dy.dim()) if d != 1]
            inverse = (variance + ctx.eps).rsqrt().view(shape)
            wide = dy.to(mean.dtype)
            n = (x - mean.view(shape)) * inverse
            dx = (wide * weight.view(shape) * inverse).to(x.dtype)
            found = dx, (wide * n).sum(others).to(weight.dtype), wide.sum(others).to(weight.dtype)
        else:
            arguments = dy, x, ctx.kernel.layout, mean, variance, weight, ctx.eps
            dx, d_gamma, d_beta = ctx.kernel.backward(*arguments, needs_dx=needs[0])
            found = dx, d_gamma.to(weight.dtype), d_beta.to(weight.dtype)
        found = tuple(grad if needed else None for grad, needed in zip(found, needs, strict=False))
        return (*found, None, None, None, None, None)
