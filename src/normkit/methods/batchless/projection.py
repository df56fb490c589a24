"""Project the gradients of weights: remove what the normalization behind them undoes.

Our own addition to Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729; see docs/batchless.md.

With ``n' = dL/dn``, batch normalization passes on ``dL/dx = (n' - mean(n') - n mean(n' n)) / sigma``; batchless normalization
passes on ``n' / sigma``. In the gradient of the linear or convolution layer that produces ``x = W h``, the two missing terms
add up over the rows to parts along two known directions: the mean of h, which shifts x, and W, which scales x. Neither
changes the function that batch normalization would train.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.methods.batchless import c_kernel
from normkit.methods.kernels.choice import kernels
from normkit.moments import is_channels_last, statistics_dtype
from normkit.optim.weight_rows import Layout, most_joined


def projected_weight_gradient(
    grad: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, *, groups: int = 1
) -> Tensor:
    """Return the gradient of W in ``x = W h`` without its parts that shift or scale x, per output of W.

    With the mean m and the variance s of h, ``v = sum(m^2 s) / m^2`` the variance of h along m, and per output

        g <- g - m (g m) / (m^2 + v),    g <- g - w (g w) / w^2.

    The first removes the share ``m^2 / (m^2 + v)`` of g along m, nothing where h is centered: it is the share of the mean in
    the squares of h along m. The second makes g orthogonal to w, as batch normalization's gradient is. For centered,
    uncorrelated inputs of equal variance the result *is* batch normalization's gradient. It is linear in g.

    Args:
        grad: g, dL/dW, ``(out, in / groups, *taps)``.
        weight: W, shape of g.
        mean: Mean of h, ``(in,)``; kernel positions share that of their channel. Finite.
        variance: Variance of h, ``(in,)``. Finite.
        groups: Groups of the convolution.

    Returns:
        Shape and dtype of g.

    Examples:
        >>> grad, weight = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
        >>> projected_weight_gradient(grad, weight, torch.tensor([0.0, 0.0, 3.0]), torch.ones(3))
        tensor([[0.0000, 1.0000, 0.1000]])
    """
    taps = grad.shape[2:].numel()
    g, w = (tensor.to(mean.dtype).reshape(groups, -1, len(mean) // groups * taps) for tensor in (grad, weight))
    tiny = torch.finfo(g.dtype).tiny

    def products(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(2, keepdim=True)

    m, s = (statistic.view(groups, 1, -1) for statistic in (mean, variance))
    square = m.square()
    length = square.sum(2, keepdim=True)  # of m at one tap
    variance_along = products(square, s) / length.clamp(min=tiny)
    m = m.repeat_interleave(taps, 2) if taps > 1 else m
    g = torch.addcmul(g, g @ (m / (variance_along + taps * length).clamp(min=tiny)).mT, m, value=-1)
    g = g.addcmul_(products(g, w) / products(w, w).clamp(min=tiny), w, value=-1)
    return g.to(grad.dtype).view_as(grad)


class Feeding(NamedTuple):
    """A layer that feeds a batchless one, at one step.

    Attributes:
        grad: The gradient of its weight, which is projected in place.
        weight: The weight.
        groups: Groups of the convolution.
        rows: Number of rows of its input.
        sums: Their sum and sum of squares, ``(in, 2)``. Statistics that are not finite count as zero.
    """

    grad: Tensor
    weight: Tensor
    groups: int
    rows: Tensor | float
    sums: Tensor

    @property
    def inputs(self) -> int:
        """Number of the layer's input channels."""
        return self.grad.shape[1] * self.groups

    @property
    def shape(self) -> c_kernel.LayerShape:
        """What the kernel must know of the layer."""
        units, inputs = self.grad.shape[0] // self.groups, self.grad.shape[1]
        return c_kernel.LayerShape(self.groups, units, inputs, self.grad.shape[2:].numel(), is_channels_last(self.grad))


class Projection:
    """:func:`projected_weight_gradient` of many weights with few operations, in place.

    Which layers are worked on together is found out once, and kept while the same layers step.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._together: list[tuple[list[int], c_kernel.Layers | _Joined]] = []

    def __reduce__(self) -> tuple[type["Projection"], tuple[()]]:
        return Projection, ()  # a copy finds out anew

    def __call__(self, layers: Sequence[Feeding]) -> dict[int, float]:
        """Project the gradients of the layers.

        Returns:
            By the ``id`` of the weight, the length of its gradient relative to its own, where a kernel found it.
        """
        kinds = [
            (grad.device, grad.dtype, grad.shape, grad.stride(), weight.stride(), groups)
            for grad, weight, groups, _, _ in layers
        ]
        key = kernels(*[layer.grad for layer in layers]), kinds
        if self._key != key:
            self._together = _join(layers, kinds)
            self._key = key
        lengths: dict[int, float] = {}
        for places, together in self._together:
            grads, weights, _, rows, sums = zip(*[layers[i] for i in places], strict=True)
            found = together.project_(grads, weights, rows, sums)
            lengths.update(zip(map(id, weights), found, strict=False))
        return lengths


def _join(layers: Sequence[Feeding], kinds: Sequence[object]) -> list[tuple[list[int], "c_kernel.Layers | _Joined"]]:
    """The places of the layers that are worked on together, and what works on them."""
    alike: dict[tuple[bool, torch.device, torch.dtype], list[int]] = {}
    for i, layer in enumerate(layers):
        kind = c_kernel.projects(layer.grad, layer.weight), layer.grad.device, layer.grad.dtype
        alike.setdefault(kind, []).append(i)
    together: list[tuple[list[int], c_kernel.Layers | _Joined]] = []
    for (by_kernel, _, dtype), places in alike.items():
        some = [layers[i] for i in places]
        if by_kernel:
            together.append((places, c_kernel.Layers(dtype, [layer.shape for layer in some])))
        else:
            together.append((places, _Joined(some, [kinds[i] for i in places])))
    return together


class _Joined:
    """Layers whose gradients torch's operations project together.

    Args:
        layers: The layers, on one device and of one dtype.
        kinds: Of each what layers must share to be worked on as one.
    """

    def __init__(self, layers: Sequence[Feeding], kinds: Sequence[object]) -> None:
        device, self._dtype = layers[0].grad.device, statistics_dtype(layers[0].grad.dtype)
        alike: dict[object, list[int]] = {}
        for i, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(i)
        starts, groups, taps, owner = [0], [], [], []
        for i, layer in enumerate(layers):
            owner += layer.inputs * [i]
            first, size = len(taps), layer.inputs // layer.groups
            groups += [first + group for group in range(layer.groups) for _ in range(size)]
            taps += layer.groups * [layer.grad.shape[2:].numel()]
            starts.append(starts[-1] + layer.inputs)
        self._owner = torch.tensor(owner, device=device)
        """Of each input its layer."""
        self._groups = torch.tensor(groups, device=device)
        """Of each input its group of channels, counted over all layers."""
        self._taps = torch.tensor(taps, dtype=self._dtype, device=device)
        """Of each group the number of kernel positions."""
        self._parts: list[_Part] = []
        columns = []
        for same in alike.values():
            most = most_joined(layers[same[0]].grad)
            for places in (same[first : first + most] for first in range(0, len(same), most)):
                self._parts.append(part := _Part(places, layers[places[0]]))
                inputs = [torch.arange(starts[i], starts[i + 1]) for i in places]
                columns.append(part.layout.along_in(torch.cat(inputs)).flatten())
        self._widths = [len(part) for part in columns]
        self._columns = torch.cat(columns).to(device)
        """Of each column of the parts' rows its input, counted over all layers."""

    def project_(
        self, grads: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[Tensor | float], sums: Sequence[Tensor]
    ) -> list[float]:
        """Project the gradients; arguments as of ``c_kernel.Layers.project_``, no length is found."""
        totals = torch.cat([*sums])
        counts = [count if isinstance(count, Tensor) else totals.new_full((), count) for count in rows]
        count = torch.stack(counts).to(totals.dtype).clamp(min=1).index_select(0, self._owner)
        mean, square = (totals / count[:, None]).unbind(1)
        variance = (square - mean.square()).clamp(min=0)
        mean, variance = (x.nan_to_num(0, 0, 0).to(self._dtype) for x in (mean, variance))
        tiny = torch.finfo(mean.dtype).tiny
        square = mean.square()
        both = torch.stack((square, square * variance))
        length, along = both.new_zeros(2, len(self._taps)).index_add_(1, self._groups, both)
        share = (along / length.clamp(min=tiny)).addcmul_(length, self._taps).clamp_(min=tiny)
        columns = torch.stack((mean, mean / share.index_select(0, self._groups))).index_select(1, self._columns)
        pairs, products, lengths = [], [], []
        for part, (m, u) in zip(self._parts, columns.split(self._widths, 1), strict=True):
            g, w = (part.layout.joined_rows([x[i] for i in part.places], mean.dtype) for x in (grads, weights))
            g.addcmul_(torch.bmm(g, part.columns(u).mT), part.columns(m), value=-1)
            products.append((g * w).sum(2).flatten())
            lengths.append(torch.linalg.vector_norm(w, dim=2).flatten())
            pairs.append((g, w))
        shares = torch.cat(products) / torch.cat(lengths).square_().clamp_(min=tiny)
        old, new = [], []
        for part, (g, w), along in zip(self._parts, pairs, shares.split([len(p) for p in products]), strict=True):
            g.addcmul_(along.view(*g.shape[:2], 1), w, value=-1)
            if g.data_ptr() != grads[part.places[0]].data_ptr():
                old += [grads[i] for i in part.places]
                new += part.layout.weight(g).chunk(len(part.places))
        if old:
            torch._foreach_copy_(old, new)
        return []


class _Part:
    """Layers of one shape as one layer with more groups.

    Args:
        places: Which layers.
        first: The first of them.
    """

    def __init__(self, places: list[int], first: Feeding) -> None:
        self.places = places
        shape = (len(places) * first.grad.shape[0], *first.grad.shape[1:])
        last = is_channels_last(first.grad)
        self.layout = Layout(shape, len(places) * first.groups, transposed=False, taps_first=last)

    def columns(self, vector: Tensor) -> Tensor:
        """One number for each column of the rows of each group."""
        return vector.view(self.layout.groups, 1, -1)
