"""Filters of many weights as rows of few matrices: layouts, shards, stacking, and the geodesic step in place.

What the optimizers of arXiv 1709.09603 do to a filter needs only inner products and sums of whole rows, so it neither
matters in which order a row's elements lie in memory, nor with which other rows of the same length a row is stacked.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.methods.sphere import dot, norm, sinc
from evenkeel.moments import statistics_dtype

# On a CPU the step is bound by memory: weights above SMALL elements are worked on where they lie, in runs of rows of at
# most CHUNK elements that stay in the cache from the first product to the last. Elsewhere the number of calls counts.
SMALL = 1 << 16
CHUNK = 1 << 19

Update = Callable[["Filters", Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


@dataclass(slots=True)
class Filters:
    """One weight on the sphere, with what moves it.

    Attributes:
        y: The weight, shape ``(C_out, ...)``, dimensions in the order of memory; shares memory with the parameter.
        gradient: Gives the gradient and, when the orthogonality penalty is not clipped, the penalty's tangent gradient.
        tau: Momentum in the layout of ``y``, float32 or wider.
        v: Second moment per filter, ``(C_out, 1)``, or None.
        correction: Bias correction of the learning rate, a number or a 0-dim tensor.
    """

    y: Tensor
    gradient: Callable[[], tuple[Tensor, Tensor | None]]
    tau: Tensor
    v: Tensor | None
    correction: float | Tensor

    @property
    def fan_in(self) -> int:
        """Elements per filter."""
        return math.prod(self.y.shape[1:])

    @property
    def in_place(self) -> bool:
        """Whether the rows can be updated where they lie."""
        return self.y.dtype == self.tau.dtype and self.y.is_contiguous() and self.tau.is_contiguous()


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # pyright: ignore[reportAttributeAccessIssue]


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """Dimensions of ``x`` by falling stride, the first kept first, or None where they are in that order already.

    Examples:
        >>> x = torch.zeros(8, 3, 5, 5)
        >>> memory_order(x), memory_order(x.to(memory_format=torch.channels_last))
        (None, (0, 2, 3, 1))
    """
    return None if x.is_contiguous() else (0, *sorted(range(1, x.ndim), key=lambda dim: -x.stride(dim)))


def arranged(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """This rank's part of ``x`` with its dimensions in the given order."""
    x = local(x)
    return x if order is None else x.permute(order)


def rows(x: Tensor) -> Tensor:
    """``(C_out, ...)`` as ``(C_out, fan-in)``."""
    return x.flatten(1)


def clip_rows(h: Tensor, max_norm: float) -> Tensor:
    """Rows no longer than ``max_norm``: ``h min(1, max_norm / |h|)``, each filter on its own.

    Examples:
        >>> clip_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1.0).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return h * (max_norm / norm(h)).clamp(max=1)


def orthogonality_gradient(y: Tensor, alpha: float, others: Tensor | None = None) -> Tensor:
    """Gradient ``2 alpha (W W^T - I) W`` of the penalty ``(alpha / 2) |W W^T - I|_F^2`` on the filters ``W``.

    Args:
        y: Filters whose gradient is wanted, unit rows of shape ``(rows, n)``.
        alpha: Strength.
        others: All filters of the weight, shape ``(C_out, n)``, when ``y`` is a shard of them.

    Returns:
        The gradient, shape ``(rows, n)``.

    Examples:
        >>> orthogonality_gradient(torch.eye(2, 3), alpha=0.1).abs().max().item()
        0.0
    """
    others = y if others is None else others
    return torch.addmm(y, y @ others.T, others, beta=-2 * alpha, alpha=2 * alpha)


def rotate(y: Tensor, m: Tensor, scale: Tensor | None, shrink: Tensor) -> Tensor:
    """The geodesic step ``d = scale m`` from ``y shrink``: gives the new rows, and carries ``m`` along in place.

    With ``t = |d|``: ``y cos t + d sinc t`` and ``m cos t - y scale |m|^2 sinc t``, which is ``pt_y(m; d)`` as ``m``
    and ``d`` are parallel.

    Args:
        y: Rows, of unit length once multiplied by ``shrink``.
        m: Tangent vectors at ``y``.
        scale: Length of the step in units of ``m``, per row ``(rows, 1)``; None for 1.
        shrink: Factor per row ``(rows, 1)``.

    Returns:
        The new unit rows.
    """
    length = norm(m)
    t = length if scale is None else length * scale
    cosine, along = t.cos(), sinc(t)
    back = length.mul(t).mul_(along).mul_(shrink)
    if scale is not None:
        along.mul_(scale)
    moved = (y * (cosine * shrink)).addcmul_(m, along)
    m.mul_(cosine).addcmul_(y, back, value=-1)
    return moved


def tangent(y: Tensor, g: Tensor, shrink: Tensor) -> Tensor:
    """Part of ``g`` orthogonal to the rows ``y``, whose lengths are ``1 / shrink``."""
    return torch.addcmul(g, y, dot(y, g).mul_(shrink).mul_(shrink), value=-1)


def advance(filters: Iterable[Filters], update: Update) -> None:
    """Apply ``update`` to all filters with few calls: rows of equal length stacked, large weights in place run by run.

    Args:
        filters: The weights.
        update: Gets one of the weights, for its correction, and the matrices ``y, g, extra, tau, v`` of equally many
            rows; gives the new ``y`` and updates ``tau`` and ``v`` in place.
    """
    stacks: dict[Hashable, list[Filters]] = {}
    for one in filters:
        if one.in_place and one.y.device.type == "cpu" and one.y.numel() > SMALL:
            _advance_in_place(one, update)
        else:
            stacks.setdefault((one.y.device, one.tau.dtype, one.fan_in, one.correction), []).append(one)
    for stack in stacks.values():
        for part in _parts(stack):
            _advance_stacked(part, update)


def _parts(stack: list[Filters]) -> list[list[Filters]]:
    """The stack in parts that fit the cache of a CPU; elsewhere as it is."""
    parts: list[list[Filters]] = [[]]
    for one in stack:
        size = sum(other.y.numel() for other in parts[-1])
        if parts[-1] and one.y.device.type == "cpu" and size + one.y.numel() > CHUNK:
            parts.append([])
        parts[-1].append(one)
    return parts


def _advance_in_place(one: Filters, update: Update) -> None:
    g, extra = one.gradient()
    run = max(1, CHUNK // one.fan_in)
    for start in range(0, one.y.shape[0], run):
        piece = slice(start, start + run)
        y, tau = rows(one.y[piece]), rows(one.tau[piece])
        v = None if one.v is None else one.v[piece]
        y.copy_(update(one, y, g[piece], None if extra is None else extra[piece], tau, v))


def _advance_stacked(stack: list[Filters], update: Update) -> None:
    gradients, extras = zip(*(one.gradient() for one in stack), strict=True)
    wide = stack[0].tau.dtype
    y = torch.cat([rows(one.y) for one in stack]).to(wide)
    g = torch.cat([x.to(wide) for x in gradients])
    tau = torch.cat([rows(one.tau) for one in stack])
    v = torch.cat([one.v for one in stack if one.v is not None]) if stack[0].v is not None else None
    extra = None
    if any(x is not None for x in extras):
        extra = torch.cat([
            torch.zeros_like(g_, dtype=wide) if x is None else x for x, g_ in zip(extras, gradients, strict=True)
        ])
    moved = update(stack[0], y, g, extra, tau, v)
    sizes = [one.y.shape[0] for one in stack]
    for target, parts in (("y", moved.split(sizes)), ("tau", tau.split(sizes))):
        torch._foreach_copy_(
            [getattr(one, target) for one in stack],
            [part.view(getattr(one, target).shape) for one, part in zip(stack, parts, strict=True)],
        )
    if v is not None:
        torch._foreach_copy_([one.v for one in stack if one.v is not None], list(v.split(sizes)))


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.to(statistics_dtype(x.dtype))
