"""One Triton kernel for the steps of SGD-G and Adam-G (arXiv 1709.09603): a program per filter, all weights in one launch.

A row is read from memory once and then again from the cache, three times in all: for its length and its product with the
gradient, for the lengths of the tangent gradient and the momentum, and for the update. Imported only where Triton is.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl

from normkit.methods.riemannian.filters import Filters


@triton.jit
def _advance(
    pointers,
    corrections,
    fan_ins,
    firsts,
    owners,
    weights,
    lr,
    momentum,
    beta2,
    eps,
    max_norm,
    ADAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    weight = tl.load(owners + row)
    n = tl.load(fan_ins + weight)
    index = row - tl.load(firsts + weight)
    offset = index.to(tl.int64) * n
    y_row = tl.load(pointers + weight).to(tl.pointer_type(tl.float32)) + offset
    g_row = tl.load(pointers + weights + weight).to(tl.pointer_type(tl.float32)) + offset
    tau_row = tl.load(pointers + 2 * weights + weight).to(tl.pointer_type(tl.float32)) + offset
    lanes = tl.arange(0, BLOCK)

    yy = tl.zeros([BLOCK], tl.float32)
    yg = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        inside = start + lanes < n
        y = tl.load(y_row + start + lanes, mask=inside, other=0.0)
        g = tl.load(g_row + start + lanes, mask=inside, other=0.0)
        yy += y * y
        yg += y * g
    square = tl.sum(yy)
    a = tl.sum(yg) / square

    hh = tl.zeros([BLOCK], tl.float32)
    th = tl.zeros([BLOCK], tl.float32)
    tt = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        inside = start + lanes < n
        y = tl.load(y_row + start + lanes, mask=inside, other=0.0)
        g = tl.load(g_row + start + lanes, mask=inside, other=0.0)
        tau = tl.load(tau_row + start + lanes, mask=inside, other=0.0)
        h = g - a * y
        hh += h * h
        th += tau * h
        tt += tau * tau
    h_square = tl.sum(hh)
    clip = max_norm / tl.maximum(tl.sqrt(h_square), max_norm)

    if ADAM:
        push = (1.0 - momentum) * clip
        v_row = tl.load(pointers + 3 * weights + weight).to(tl.pointer_type(tl.float32)) + index
        v = beta2 * tl.load(v_row) + (1.0 - beta2) * clip * clip * h_square
        tl.store(v_row, v)
        scale = -lr * tl.load(corrections + weight) / tl.sqrt(v + eps)
    else:
        push = -lr * clip
        scale = 1.0
    m_square = momentum * momentum * tl.sum(tt) + 2.0 * momentum * push * tl.sum(th) + push * push * h_square
    m_square = tl.maximum(m_square, 0.0)
    t = tl.abs(scale) * tl.sqrt(m_square)
    cosine = tl.cos(t)
    sinc = tl.where(t > 1e-4, tl.sin(t) / tl.maximum(t, 1e-4), 1.0 - t * t / 6.0)
    shrink = 1.0 / tl.sqrt(square)
    back = scale * m_square * sinc * shrink

    for start in range(0, n, BLOCK):
        inside = start + lanes < n
        y = tl.load(y_row + start + lanes, mask=inside, other=0.0)
        g = tl.load(g_row + start + lanes, mask=inside, other=0.0)
        tau = tl.load(tau_row + start + lanes, mask=inside, other=0.0)
        m = momentum * tau + push * (g - a * y)
        tl.store(y_row + start + lanes, cosine * shrink * y + scale * sinc * m, mask=inside)
        tl.store(tau_row + start + lanes, cosine * m - back * y, mask=inside)


class FusedRows:
    """Launches the kernel; what depends only on shapes is kept on the device between steps."""

    def __init__(self) -> None:
        self._shapes: list[tuple[int, int]] = []
        self._layout: tuple[torch.Tensor, ...] = ()

    def advance(self, weights: list[Filters], *, lr: float, momentum: float, max_norm: float, **adam: float) -> None:
        """Step all filters, in place: what ``sgdg`` and ``adamg`` compute, in one launch.

        Args:
            weights: float32 weights whose rows lie in one line of memory.
            lr: Learning rate.
            momentum: Share of tau that is kept.
            max_norm: Bound on the length of a filter's tangent gradient.
            **adam: ``beta2`` and ``eps`` for Adam-G.
        """
        device = weights[0].y.device
        gradients = [filters.gradient().contiguous() for filters in weights]
        self._place([(filters.y.shape[0], filters.fan_in) for filters in weights], device)
        table = [[filters.y.data_ptr() for filters in weights], [g.data_ptr() for g in gradients]]
        table += [
            [filters.tau.data_ptr() for filters in weights],
            [0 if filters.v is None else filters.v.data_ptr() for filters in weights],
        ]
        pointers = _sent(torch.tensor(table, dtype=torch.int64), device)
        corrections = _sent(torch.tensor([filters.correction for filters in weights], dtype=torch.float32), device)
        fan_ins, firsts, owners = self._layout
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            _advance[(len(owners),)](
                *(pointers, corrections, fan_ins, firsts, owners, len(weights)),
                *(lr, momentum, adam.get("beta2", 0.0), adam.get("eps", 0.0), min(max_norm, 3e38)),
                ADAM=bool(adam),
                BLOCK=1024,
            )

    def _place(self, shapes: list[tuple[int, int]], device: torch.device) -> None:
        if shapes == self._shapes:
            return
        counts = torch.tensor([count for count, _ in shapes])
        fan_ins = torch.tensor([fan_in for _, fan_in in shapes], dtype=torch.int32)
        firsts = (counts.cumsum(0) - counts).to(torch.int32)
        owners = torch.repeat_interleave(torch.arange(len(shapes), dtype=torch.int32), counts)
        self._layout = tuple(x.to(device) for x in (fan_ins, firsts, owners))
        self._shapes = shapes


def _sent(table: torch.Tensor, device: torch.device) -> Any:
    """To the device without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
