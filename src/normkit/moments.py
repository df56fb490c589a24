"""Mean and variance of rows: observe, merge, reduce over ranks.

A *row* is one feature vector: a sample of a linear layer's input, a position of a feature map. The functions here are
the only statistics code of the package; preconditioning, batchless normalization and the instruments use them.

Merging follows Chan, Golub, LeVeque (1979): two groups of rows merge to exactly the moments of their union, so the result
does not depend on micro-batches and ranks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of rows, per feature.

    Attributes:
        count: Number of rows, a scalar tensor in the dtype of the statistics (fp32 or wider).
        mean: Mean per feature, shape ``(features,)``.
        m2: Sum of squared deviations from the mean per feature, shape ``(features,)``; the variance is ``m2 / count``.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance ``m2 / count`` per feature (0 where nothing was observed)."""
        return self.m2 / self.count.clamp(min=1)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics of ``dtype`` data are kept: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory format by number of dimensions."""


def is_channels_last(x: Tensor) -> bool:
    """Return whether the entries along dimension 1 lie side by side in memory, and those along the others do not."""
    return x.dim() in CHANNELS_LAST and not x.is_contiguous() and x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])


def keep_fp32(new: Tensor, old: Tensor) -> Tensor:
    """Undo a cast of a statistic below fp32 (``module.half()``), where small steps would round to nothing.

    Args:
        new: The statistic after the cast.
        old: The statistic before it.

    Returns:
        ``new``, or ``old`` on the device of ``new`` where ``new`` is narrower than fp32.
    """
    return old.to(new.device) if new.dtype.itemsize < 4 else new


def empty(features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Moments:
    """Return the moments of no rows."""
    return Moments(
        torch.zeros((), dtype=dtype, device=device),
        torch.zeros(features, dtype=dtype, device=device),
        torch.zeros(features, dtype=dtype, device=device),
    )


@lru_cache(maxsize=256)
def constant_count(count: float, dtype: torch.dtype) -> Tensor:
    """Return a count as the moments hold it, on the CPU; the same tensor each time, never to be written to."""
    return torch.full((), count, dtype=dtype)


_SMALL = 1 << 16
"""Elements up to which a launch costs more than a pass."""


def sum_and_square_sum(x: Tensor, feature_dim: int = -1, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return sum and sum of squares over every dimension but ``feature_dim``, in one pass each, in fp32 or wider.

    The layout decides how: reductions along the contiguous dimension run at the speed of memory, others are slower.

    Args:
        x: Activations of any shape; nothing is recorded for autograd.
        feature_dim: Dimension that holds the features.
        dtype: Dtype of the sums, default that of statistics of ``x``.

    Returns:
        Two tensors of shape ``(features,)``.

    Examples:
        >>> [t.tolist() for t in sum_and_square_sum(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))]
        [[4.0, 20.0], [10.0, 200.0]]
    """
    x, dtype = x.detach(), dtype or statistics_dtype(x.dtype)
    if x.dim() == 1:
        x, feature_dim = x.unsqueeze(0), 1  # a sum over no dimension would be one over all
    dims = x.dim()
    feature_dim %= dims
    if torch.compiler.is_compiling() or x.numel() <= _SMALL:  # compiled, it is one reduction that reads x once
        x, others = x.to(dtype), [d for d in range(dims) if d != feature_dim]
        return x.sum(others), x.square().sum(others)
    if x.is_cpu and x.dtype != dtype:
        x = x.to(dtype)  # the mixed-precision reductions are the slow ones there
    if feature_dim == dims - 1 or x.stride(feature_dim) == 1:
        rows = x.movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim])
        if x.is_cpu:
            return rows.sum(0), rows.square().sum(0)
        return rows.sum(0, dtype=dtype), torch.linalg.vector_norm(rows, dim=0, dtype=dtype).square()
    positions = tuple(range(feature_dim + 1, dims))
    total, square = x.sum(positions, dtype=dtype), torch.linalg.vector_norm(x, dim=positions, dtype=dtype).square_()
    if feature_dim == 0:
        return total, square
    images = tuple(range(feature_dim))
    return total.sum(images), square.sum(images)


_FITS_CACHE = 1 << 20
"""Elements up to which a product that is written to memory costs less than the reduction that avoids it, on a CPU."""


_FEW_CHANNELS = 8
"""Channels, side by side in memory, below which two reductions take a fraction of the time of the one that gives both."""


def weighted_sums(x: Tensor, weights: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return sum and sum of squares per channel over samples and positions, with a weight for each position.

    The instances are summed first, whatever the layout, so that only sums the size of one instance meet the weights.

    Args:
        x: Feature maps ``(N, C, *spatial)`` or, of one instance, ``(C, *spatial)``; nothing is recorded for autograd.
        weights: Weight of each position, shape ``spatial``.
        dtype: Dtype of the sums, default that of statistics of ``x``.

    Returns:
        Two tensors of shape ``(C,)``.

    Examples:
        >>> [t.tolist() for t in weighted_sums(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([1.0, 1.0, 0.5]))]
        [[4.5], [9.5]]
    """
    x, dtype = x.detach(), dtype or statistics_dtype(x.dtype)
    if weights.dtype != dtype:
        weights = weights.to(dtype)
    if x.dim() == weights.dim() + 1:
        x = x.unsqueeze(0)
    if torch.compiler.is_compiling():  # one reduction that reads x once
        x, others = x.to(dtype), [0, *range(2, x.dim())]
        return (x * weights).sum(others), (x.square() * weights).sum(others)
    if x.is_cpu and x.numel() <= _FITS_CACHE:
        x = x if x.dtype == dtype else x.to(dtype)
        return _products(x, x * weights)
    channels_last = x.movedim(1, -1).is_contiguous()
    rows = (x.movedim(1, -1) if channels_last else x).flatten(1)
    if x.is_cpu:
        rows = rows.to(dtype)
        total, square = _products(rows, rows)
    else:
        total, square = rows.sum(0, dtype=dtype), torch.linalg.vector_norm(rows, dim=0, dtype=dtype).square_()
    channels, flat = x.shape[1], weights.flatten()
    maps = (m.view(-1, channels).t() if channels_last else m.view(channels, -1) for m in (total, square))
    total, square = (m @ flat for m in maps)
    return total, square


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``y`` and of ``x y`` over all dimensions but the second, in one pass on a CPU.

    They are the gradients of shift and scale of a batch normalization with mean 0 and variance 1.
    """
    if x.shape[1] < _FEW_CHANNELS and x.stride(1) == 1:
        others = [0, *range(2, x.dim())]
        return y.sum(others), (x * y).sum(others)
    zero = torch.zeros(x.shape[1], dtype=x.dtype)  # the mean, and with 1 added to it the variance
    _, product, total = torch.ops.aten.native_batch_norm_backward.default(
        y, x, None, zero, zero, None, None, False, 1.0, [False, True, True]
    )
    return total, product


def observe(x: Tensor, feature_dim: int = -1, mask: Tensor | None = None) -> Moments:
    """Return the moments of all rows of ``x`` along every dimension but ``feature_dim``.

    Rows with a non-finite entry anywhere in ``x`` make the whole observation count as no rows (an overflowed batch must
    not poison running statistics); no host synchronisation is needed for it. Deviations are summed about the mean of
    ``x``, so that features far from zero lose no digits.

    Args:
        x: Activations of any shape.
        feature_dim: Dimension that holds the features (1 for images, -1 for tokens).
        mask: Optional boolean tensor, broadcastable to ``x`` without its feature dimension; only True rows count.

    Returns:
        Moments with ``x.shape[feature_dim]`` features, in fp32 or wider.

    Examples:
        >>> m = observe(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> m.count.item(), m.mean.tolist(), m.variance.tolist()
        (2.0, [2.0, 10.0], [1.0, 0.0])
    """
    return finite(observe_unchecked(x, feature_dim, mask))


def observe_unchecked(x: Tensor, feature_dim: int = -1, mask: Tensor | None = None) -> Moments:
    """[`normkit.moments.observe`][] without its check: moments that are not finite stay so, to be checked together later."""
    x = x.detach()
    dtype = statistics_dtype(x.dtype)
    features = x.shape[feature_dim]
    if x.numel() == 0:
        return empty(features, dtype=dtype, device=x.device)
    broadcast = [1] * x.dim()
    broadcast[feature_dim] = features
    kept = None
    if mask is None:
        count = torch.full((), x.numel() / features, dtype=dtype, device=x.device)
    else:
        kept = mask.to(torch.bool).expand(x.movedim(feature_dim, -1).shape[:-1])
        count = kept.sum(dtype=dtype)
        kept = kept.unsqueeze(-1).movedim(-1, feature_dim)
        x = torch.where(kept, x, 0)
    mean = sum_and_square_sum(x, feature_dim)[0] / count.clamp(min=1)
    deviation = x - mean.reshape(broadcast)
    if kept is not None:
        deviation = torch.where(kept, deviation, 0)
    return Moments(count, mean, sum_and_square_sum(deviation, feature_dim)[1])


def finite(moments: Moments) -> Moments:
    """Return the moments, or moments of no rows when any of them is not finite (decided on the device)."""
    ok = torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()
    zero = moments.mean.new_zeros(())
    return Moments(
        torch.where(ok, moments.count, zero), torch.where(ok, moments.mean, zero), torch.where(ok, moments.m2, zero)
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two groups of rows, exact up to rounding.

    With ``n = n_a + n_b`` and ``d = mean_b - mean_a``: ``mean = mean_a + d n_b / n``, ``m2 = m2_a + m2_b + d^2 n_a
    n_b / n``.

    Examples:
        >>> x = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
        >>> whole, parts = observe(x), merge(observe(x[:1]), observe(x[1:]))
        >>> torch.allclose(whole.m2, parts.m2, rtol=1e-12), parts.mean.tolist()
        (True, [4.0, 5.0])
    """
    count = a.count + b.count
    share = b.count / count.clamp(min=1)
    delta = b.mean - a.mean
    return Moments(count, a.mean + delta * share, a.m2 + b.m2 + delta.square() * (a.count * share))


def reduce(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> list[Moments]:
    """Return the moments of all ranks' rows, for all layers together, in one all-reduce.

    Args:
        moments: One entry per layer, in the same order on every rank (a layer that saw nothing contributes no rows).
        group: Process group, default the world.

    Returns:
        The merged moments, in the dtypes of the given ones.
    """
    return reduce_together(moments, (), group)[0]


def reduce_together(
    moments: Sequence[Moments], sums: Sequence[Tensor], group: dist.ProcessGroup | None = None
) -> tuple[list[Moments], list[Tensor]]:
    """Return the moments of all ranks' rows, and tensors summed over ranks, in one all-reduce.

    Sums of squares about a zero pivot would cancel in fp32, so the flattened vector ``(count, count mean, m2 + count
    mean^2)`` travels in float64. Without an initialized process group, or with one rank, everything comes back unchanged.

    Args:
        moments: In the same order on every rank; one that saw nothing contributes no rows.
        sums: Tensors, of the same shapes on every rank.
        group: Process group, default the world.

    Returns:
        The merged moments and the sums, in the dtypes of the given ones.
    """
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
    if alone or not (moments or sums):
        return list(moments), list(sums)
    parts = []
    for m in moments:
        count, mean, m2 = m.count.double(), m.mean.double(), m.m2.double()
        parts += [count.reshape(1), count * mean, m2 + count * mean.square()]
    flat = torch.cat([*parts, *(tensor.double().flatten() for tensor in sums)])
    dist.all_reduce(flat, group=group)
    pieces = iter(
        flat.split([size for m in moments for size in (1, m.mean.numel(), m.mean.numel())] + [t.numel() for t in sums])
    )
    merged = []
    for m in moments:
        (count,), total, square = next(pieces), next(pieces), next(pieces)
        mean = total / count.clamp(min=1)
        m2 = (square - count * mean.square()).clamp(min=0)
        merged.append(Moments(count.to(m.count.dtype), mean.to(m.mean.dtype), m2.to(m.m2.dtype)))
    return merged, [piece.view_as(tensor).to(tensor.dtype) for piece, tensor in zip(pieces, sums, strict=True)]


class Tally:
    """Moments of the rows that were counted since they were last taken."""

    def __init__(self) -> None:
        self.pending: Moments | None = None

    def add(self, moments: Moments) -> None:
        """Count ``moments``."""
        self.pending = moments if self.pending is None else merge(self.pending, moments)

    def take(self) -> Moments | None:
        """Return the moments since the last call, and start anew."""
        pending, self.pending = self.pending, None
        return pending
