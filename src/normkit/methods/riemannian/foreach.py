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
SMALL = 1 << 14
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
        vs: Second moments per filter, updated in place; none for SGD-G.
        weights: What ``y`` is a stack of; none where it is no copy.
        momenta: What ``tau`` is a stack of; none where it is no copy.
    """

    y: Tensor
    g: Tensor
    tau: Tensor
    h: Tensor
    vs: list[Tensor]
    weights: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] = field(default_factory=list)


def advance(
    weights: Iterable[Filters],
    *,
    lr: float | Tensor,
    momentum: float,
    max_norm: float,
    beta2: float | None = None,
    eps: float = 0.0,
) -> None:
    """Step all filters, in place: what ``sgdg`` and ``adamg`` compute, with far fewer calls.

    Args:
        weights: The weights.
        lr: Learning rate.
        momentum: Share of tau that is kept.
        max_norm: Bound on the length of a filter's tangent gradient.
        beta2: Decay of the second moment, for Adam-G.
        eps: Added to the second moment, for Adam-G.
    """
    alike: dict[Hashable, list[Filters]] = {}
    for filters in weights:
        alike.setdefault((filters.y.device, filters.tau.dtype, filters.correction), []).append(filters)
    for some in alike.values():
        rate, limit = lr * some[0].correction, CHUNK.get(some[0].y.device.type, LARGE)
        batch: list[Matrix] = []
        for matrix in _matrices(some, limit):
            if batch and sum(other.y.numel() for other in batch) + matrix.y.numel() > limit:
                _step(batch, rate, momentum, max_norm, beta2, eps)
                batch = []
            batch.append(matrix)
        _step(batch, rate, momentum, max_norm, beta2, eps)


def _matrices(weights: list[Filters], limit: int) -> Iterator[Matrix]:
    stacks: dict[Hashable, list[Filters]] = {}
    for filters in weights:
        if filters.in_place and filters.y.device.type == "cpu" and filters.y.numel() > SMALL:
            g = filters.gradient()
            count = max(1, limit // filters.fan_in)
            for run in (slice(start, start + count) for start in range(0, g.shape[0], count)):
                y, tau = rows(filters.y[run]), rows(filters.tau[run])
                yield Matrix(y, rows(g[run]), tau, torch.empty_like(y), [] if filters.v is None else [filters.v[run]])
        else:
            stack = stacks.setdefault((filters.y.dtype, filters.y.shape[1:]), [])
            if stack and sum(other.y.numel() for other in stack) + filters.y.numel() > limit:
                yield _stacked(stack)
                stack.clear()
            stack.append(filters)
    yield from (_stacked(stack) for stack in stacks.values())


def _stacked(stack: list[Filters]) -> Matrix:
    """Weights of one shape, one above the other."""
    ys, taus = [filters.y for filters in stack], [filters.tau for filters in stack]
    vs = [filters.v for filters in stack if filters.v is not None]
    gradients = [filters.gradient() for filters in stack]
    # One block of memory: of several large ones the C library hands the freed top back to the system at every step, and
    # the page faults to get it again cost more than the step.
    size = (4, sum(y.shape[0] for y in ys), *ys[0].shape[1:])
    y, g, tau, h = torch.empty(size, dtype=taus[0].dtype, device=ys[0].device).unbind()
    for parts, whole in ((ys, y), (gradients, g), (taus, tau)):
        torch.cat(parts, out=whole)
    return Matrix(rows(y), rows(g), rows(tau), rows(h), vs, ys, taus)


def _step(
    batch: list[Matrix], rate: float | Tensor, momentum: float, max_norm: float, beta2: float | None, eps: float
) -> None:
    ys, gs, taus, hs = zip(*((matrix.y, matrix.g, matrix.tau, matrix.h) for matrix in batch), strict=True)
    sizes = [y.shape[0] for y in ys]

    # h = g - (y.g) y, with rows y that rounding, or weights loaded since, may have taken off the sphere
    shrink = _norms(ys).reciprocal_()
    radial = torch.cat([torch.mul(y, g, out=h).sum(1, keepdim=True) for y, g, h in zip(ys, gs, hs, strict=True)])
    for y, g, h, share in zip(ys, gs, hs, radial.mul_(shrink).mul_(shrink).split(sizes), strict=True):
        torch.addcmul(g, y, share, value=-1, out=h)
    length = _norms(hs)
    clip = length.reciprocal().mul_(max_norm).clamp_(max=1)
    length.mul_(clip).nan_to_num_(0)  # a length that overflows is clipped to zero
    # m = momentum tau + gain h, d = scale m
    torch._foreach_mul_(taus, momentum)
    if beta2 is None:
        torch._foreach_addcmul_(taus, hs, clip.mul_(-rate).split(sizes))
        m = t = _norms(taus)
    else:
        torch._foreach_addcmul_(taus, hs, clip.split(sizes), 1 - momentum)
        vs = [v for matrix in batch for v in matrix.vs]
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

    for matrix in batch:
        for stack, parts in ((matrix.y, matrix.weights), (matrix.tau, matrix.momenta)):
            if parts:
                whole = stack.view(-1, *parts[0].shape[1:]).to(parts[0].dtype)
                torch.split_with_sizes_copy(whole, [part.shape[0] for part in parts], out=parts)


def _norms(matrices: Sequence[Tensor]) -> Tensor:
    """Lengths of all rows, ``(rows, 1)``."""
    return torch.cat([norm(x) for x in matrices])
