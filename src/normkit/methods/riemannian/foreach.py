"""The steps of SGD-G and Adam-G (arXiv 1709.09603) for all filters with few calls.

Weights of one shape are stacked to one matrix, large ones on a CPU are worked on where they lie; what is one number per
filter (lengths, clips, angles) is computed for all matrices at once.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.methods.riemannian.filters import Filters, rows
from normkit.methods.riemannian.sphere import norm

# A step sweeps over its matrices operation by operation. On a CPU it is bound by memory: at most CHUNK elements go through
# a step together, so that a cache can hold them, and weights above SMALL elements are not copied. Elsewhere calls count:
# LARGE only bounds the memory.
SMALL = 1 << 16
CHUNK = {"cpu": 1 << 19}
LARGE = 1 << 24


@dataclass(slots=True)
class Matrix:
    """Rows of equal length that go through a step: a run of rows where they lie, or some weights stacked.

    Attributes:
        y: Rows, of unit length up to rounding; updated in place.
        g: Gradient.
        tau: Momentum; updated in place.
        h: Memory of the same shape.
        extra: Tangent gradient that is added after the clip, or None.
        vs: Second moments per filter, updated in place; none for SGD-G.
        weights: What ``y`` is a stack of; none where it is no copy.
        momenta: What ``tau`` is a stack of; none where it is no copy.
    """

    y: Tensor
    g: Tensor
    tau: Tensor
    h: Tensor
    extra: Tensor | None
    vs: list[Tensor]
    weights: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] = field(default_factory=list)


def advance(
    filters: Iterable[Filters],
    *,
    lr: float | Tensor,
    keep: float,
    max_norm: float,
    beta2: float | None = None,
    eps: float = 0.0,
) -> None:
    """One step for all filters, in place.

    Args:
        filters: The weights.
        lr: Learning rate.
        keep: Share of the momentum that is kept.
        max_norm: Bound on the length of a filter's tangent gradient.
        beta2: Decay of the second moment, for Adam-G.
        eps: Added to the second moment, for Adam-G.
    """
    alike: dict[Hashable, list[Filters]] = {}
    for one in filters:
        alike.setdefault((one.y.device, one.tau.dtype, one.correction), []).append(one)
    for some in alike.values():
        rate, limit = lr * some[0].correction, CHUNK.get(some[0].y.device.type, LARGE)
        batch: list[Matrix] = []
        for matrix in _matrices(some, limit):
            if batch and sum(one.y.numel() for one in batch) + matrix.y.numel() > limit:
                _step(batch, rate, keep, max_norm, beta2, eps)
                batch = []
            batch.append(matrix)
        _step(batch, rate, keep, max_norm, beta2, eps)


def _matrices(filters: list[Filters], limit: int) -> Iterator[Matrix]:
    stacks: dict[Hashable, list[Filters]] = {}
    for one in filters:
        if one.in_place and one.y.device.type == "cpu" and one.y.numel() > SMALL:
            g, extra = one.gradient()
            count = max(1, limit // one.fan_in)
            for run in (slice(start, start + count) for start in range(0, g.shape[0], count)):
                y, tau, extra_ = rows(one.y[run]), rows(one.tau[run]), None if extra is None else rows(extra[run])
                yield Matrix(y, rows(g[run]), tau, torch.empty_like(y), extra_, [] if one.v is None else [one.v[run]])
        else:
            stack = stacks.setdefault((one.y.dtype, one.y.shape[1:]), [])
            if stack and sum(other.y.numel() for other in stack) + one.y.numel() > limit:
                yield _stacked(stack)
                stack.clear()
            stack.append(one)
    yield from (_stacked(stack) for stack in stacks.values())


def _stacked(stack: list[Filters]) -> Matrix:
    """Weights of one shape, one above the other."""
    ys, taus, vs = [one.y for one in stack], [one.tau for one in stack], [one.v for one in stack if one.v is not None]
    gradients, extras = zip(*(one.gradient() for one in stack), strict=True)
    # One block of memory: of several large ones the C library hands the freed top back to the system at every step, and
    # the page faults to get it again cost more than the step.
    size = (4, sum(y.shape[0] for y in ys), *ys[0].shape[1:])
    y, g, tau, h = torch.empty(size, dtype=taus[0].dtype, device=ys[0].device).unbind()
    for parts, whole in ((ys, y), (gradients, g), (taus, tau)):
        torch.cat(parts, out=whole)
    extra = None
    if any(x is not None for x in extras):
        extra = torch.cat([torch.zeros_like(t) if x is None else x for x, t in zip(extras, taus, strict=True)])
        extra = rows(extra)
    return Matrix(rows(y), rows(g), rows(tau), rows(h), extra, vs, ys, taus)


def _step(
    batch: list[Matrix], rate: float | Tensor, keep: float, max_norm: float, beta2: float | None, eps: float
) -> None:
    ys, gs, taus, hs = zip(*((one.y, one.g, one.tau, one.h) for one in batch), strict=True)
    sizes = [y.shape[0] for y in ys]

    # h = g - (y.g) y, with rows y that rounding, or weights loaded since, may have taken off the sphere
    shrink = _norms(ys).reciprocal_()
    radial = torch.cat([torch.mul(y, g, out=h).sum(1, keepdim=True) for y, g, h in zip(ys, gs, hs, strict=True)])
    for y, g, h, share in zip(ys, gs, hs, radial.mul_(shrink).mul_(shrink).split(sizes), strict=True):
        torch.addcmul(g, y, share, value=-1, out=h)
    length = _norms(hs)
    clip = length.reciprocal().mul_(max_norm).clamp_(max=1)
    length.mul_(clip)
    if any(one.extra is not None for one in batch):
        torch._foreach_mul_(hs, clip.split(sizes))
        for one in batch:
            if one.extra is not None:
                one.h.add_(one.extra)
        length, clip = _norms(hs), torch.ones_like(clip)

    # m = keep tau + gain h, d = scale m
    torch._foreach_mul_(taus, keep)
    if beta2 is None:
        torch._foreach_addcmul_(taus, hs, clip.mul_(-rate).split(sizes))
        m = t = _norms(taus)
    else:
        torch._foreach_addcmul_(taus, hs, clip.split(sizes), 1 - keep)
        vs = [v for one in batch for v in one.vs]
        v = torch.cat(vs).mul_(beta2).addcmul_(length, length, value=1 - beta2)
        torch.split_with_sizes_copy(v, [x.shape[0] for x in vs], out=vs)
        m = _norms(taus)
        t = m * v.add_(eps).rsqrt_().mul_(-rate)

    # exp_y(d) = y cos t + m sin t / |m| and pt_y(m; d) = m cos t - y |m| sin t; a filter with m = 0 stays
    cosine, sine = t.cos(), t.sin()
    along, back = sine / m.clamp(min=torch.finfo(m.dtype).tiny), sine.mul_(m).mul_(shrink).neg_()
    for y, x, h in zip(ys, back.split(sizes), hs, strict=True):
        torch.mul(y, x, out=h)
    torch._foreach_mul_(ys, (cosine * shrink).split(sizes))
    torch._foreach_addcmul_(ys, taus, along.split(sizes))
    for h, tau, x in zip(hs, taus, cosine.split(sizes), strict=True):
        torch.addcmul(h, tau, x, out=tau)

    for one in batch:
        for stack, parts in ((one.y, one.weights), (one.tau, one.momenta)):
            if parts:
                whole = stack.view(-1, *parts[0].shape[1:]).to(parts[0].dtype)
                torch.split_with_sizes_copy(whole, [part.shape[0] for part in parts], out=parts)


def _norms(matrices: Sequence[Tensor]) -> Tensor:
    """Lengths of all rows, ``(rows, 1)``."""
    return torch.cat([norm(x) for x in matrices])
