"""The steps of SGD-G and Adam-G (arXiv 1709.09603) in C; see the source of the same name."""

from array import array
from pathlib import Path

import torch

from normkit.methods.kernels.compiled import Source
from normkit.methods.riemannian.filters import Filters

_SOURCE = Source(Path(__file__).with_suffix(".c"), advance="ipppdddddii")


def steps(weights: list[Filters]) -> bool:
    """Return whether the kernel can step the weights, which are on a CPU: rows of one type, each in one line of memory."""
    dtype = weights[0].y.dtype
    alike = all(
        filters.in_place and filters.y.dtype == dtype and (filters.v is None or filters.v.dtype == dtype)
        for filters in weights
    )
    return alike and _SOURCE.compiled(dtype) is not None


def advance(weights: list[Filters], *, lr: float, momentum: float, max_norm: float, **adam: float) -> None:
    """Step all filters, in place: what ``sgdg`` and ``adamg`` compute.

    Args:
        weights: The weights; see :func:`steps`.
        lr: Learning rate.
        momentum: Share of tau that is kept.
        max_norm: Bound on the length of a filter's tangent gradient.
        **adam: ``beta2`` and ``eps`` for Adam-G.
    """
    library = _SOURCE.compiled(weights[0].y.dtype)
    assert library is not None
    shapes, addresses = array("q"), array("q")
    gradients = [filters.gradient().contiguous() for filters in weights]
    for filters, gradient in zip(weights, gradients, strict=True):
        shapes.extend((filters.y.shape[0], filters.fan_in))
        addresses.extend(0 if t is None else t.data_ptr() for t in (filters.y, gradient, filters.tau, filters.v))
    corrections = array("d", [float(filters.correction) for filters in weights])
    library.advance(
        len(weights),
        *(numbers.buffer_info()[0] for numbers in (shapes, addresses, corrections)),
        *(lr, momentum, max_norm, adam.get("beta2", 0.0), adam.get("eps", 0.0)),
        bool(adam),
        torch.get_num_threads(),
    )
