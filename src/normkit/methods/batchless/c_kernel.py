"""The step of batchless normalization in C; see the source of the same name."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.methods.kernels.choice import kernels
from normkit.methods.kernels.compiled import Source
from normkit.methods.kernels.layout import Layout, layouts, lie_alike
from normkit.moments import Moments, constant_count

_SOURCE = Source(
    Path(__file__).with_suffix(".c"),
    project="ipppppi",
    fit="ipppdddp",
    forward="ppppppdiiiiip",
    backward="ppppppdiiiiip",
)


class LayerShape(NamedTuple):
    """What the kernel must know of a layer that feeds a batchless one.

    Attributes:
        groups: Groups of the convolution.
        units: Output units of a group.
        inputs: Input channels of a group.
        taps: Kernel positions.
        taps_first: Whether the channels of a tap lie side by side.
    """

    groups: int
    units: int
    inputs: int
    taps: int
    taps_first: bool


def projects(grad: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel can project the gradient of a weight: rows of one type that lie in one line of memory."""
    fits = kernels(grad, weight) == "c" and weight.dtype == grad.dtype and lie_alike(grad, weight)
    return fits and _SOURCE.compiled(grad.dtype) is not None


class Layers:
    """Layers whose gradients the kernel projects together.

    Args:
        dtype: Their type.
        shapes: Their shapes.
    """

    def __init__(self, dtype: torch.dtype, shapes: Sequence[LayerShape]) -> None:
        self._library = _SOURCE.compiled(dtype)
        self._shapes = array("q", [number for shape in shapes for number in shape])
        self._inputs = [shape.groups * shape.inputs for shape in shapes]

    def project_(
        self, grads: Sequence[Tensor], weights: Sequence[Tensor], rows: Sequence[Tensor | float], sums: Sequence[Tensor]
    ) -> list[float]:
        """Project the gradients.

        Args:
            grads: Gradients.
            weights: Weights.
            rows: Number of rows of each layer's input.
            sums: Their sum and sum of squares, ``(in, 2)`` for each layer.

        Returns:
            The length of each gradient relative to its weight's, 0 where the weight has none.

        Raises:
            ValueError: The sums are those of inputs that a weight does not take.
        """
        assert self._library is not None
        addresses = array("q", [t.data_ptr() for pair in zip(grads, weights, strict=True) for t in pair])
        counts, ratios = array("d", [float(count) for count in rows]), array("d", bytes(8 * len(grads)))
        sums = [t if t.dtype == torch.float64 and t.is_contiguous() else t.double().contiguous() for t in sums]
        if [t.shape[0] for t in sums] != self._inputs:
            raise ValueError(
                "a weight in front of a batchless layer has another shape than the inputs that it was given"
            )
        places = array("q", [t.data_ptr() for t in sums])
        tables = [numbers.buffer_info()[0] for numbers in (self._shapes, addresses, counts, places, ratios)]
        self._library.project(len(grads), *tables, torch.get_num_threads())
        torch.autograd.graph.increment_version(grads)
        return ratios.tolist()


def fits(tensors: Sequence[Tensor]) -> bool:
    """Return whether the kernel can work with these tensors of one type."""
    dtype = tensors[0].dtype
    if kernels(*tensors) != "c" or _SOURCE.compiled(dtype) is None:
        return False
    return all(t.dtype == dtype and t.is_contiguous() for t in tensors)


def fit_(
    features: Sequence[int],
    tensors: Sequence[Tensor],
    instances: Sequence[Tensor | float],
    *,
    eps: float,
    rate: float,
    damping: float,
) -> list[float]:
    """Step mean and variance of layers along the natural gradient, in place; not at all at a rate of 0.

    Args:
        features: Number of channels of each layer.
        tensors: Of each layer running mean and variance, then count, mean and sum of squared deviations of its rows; see
            :func:`fits`.
        instances: To how many instances the rows of each layer belong.
        eps: Of the layers.
        rate: Rate of a step of many instances.
        damping: Number of instances that step half as far as many.

    Returns:
        E n^2 of each layer before the step, mean over its channels; 1 where nothing is known.
    """
    library = _SOURCE.compiled(tensors[0].dtype)
    assert library is not None
    sizes, addresses = array("q", features), array("q", [t.data_ptr() for t in tensors])
    counts, ratios = array("d", [float(count) for count in instances]), array("d", bytes(8 * len(features)))
    tables = [numbers.buffer_info()[0] for numbers in (sizes, addresses, counts)]
    library.fit(len(features), *tables, eps, rate, damping, ratios.buffer_info()[0])
    if rate:
        torch.autograd.graph.increment_version([*tensors[::5], *tensors[1::5]])
    return ratios.tolist()


def layout_of(x: Tensor, *of_channels: Tensor) -> Layout | None:
    """Return the layout of ``x``; None where the kernels cannot read it, or the vectors over its channels."""
    return layouts(x.shape, 1).of(x) if x.numel() and fits((x.new_empty(0), *of_channels)) else None


def affine_with_moments(
    x: Tensor,
    layout: Layout,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Moments]:
    """``(x - mu) / sigma * gamma + beta`` and the moments of the rows of ``x``, in one pass.

    Args:
        x: ``(N, C, ...)``.
        layout: See :func:`layout_of`.
        mean: mu, ``(C,)``, in the dtype of ``x`` as all that follow.
        variance: ``sigma^2 - eps``, ``(C,)``.
        weight: gamma ``(C,)``, or None together with ``bias``.
        bias: beta ``(C,)``, or None.
        eps: Added to the variance.

    Returns:
        Output, in shape, dtype and layout of ``x``, and moments of C features.
    """
    library = _SOURCE.compiled(x.dtype)
    assert library is not None
    samples, channels, positions, _ = layout
    y, moments = torch.empty_like(x), torch.empty(2, channels, dtype=x.dtype)
    addresses = [None if t is None else t.data_ptr() for t in (x, y, mean, variance, weight, bias)]
    library.forward(*addresses, eps, *layout, torch.get_num_threads(), moments.data_ptr())
    return y, Moments(constant_count(samples * positions, x.dtype), *moments.unbind())


def affine_gradients(
    dy: Tensor,
    x: Tensor,
    layout: Layout,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    eps: float,
    *,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``dx = gamma dy / sigma``, ``d gamma = sum dy n`` and ``d beta = sum dy``, in one pass over ``(x, dy)``.

    Args:
        dy: Gradient of the output, shape of ``x``.
        x: ``(N, C, ...)``.
        layout: See :func:`layout_of`.
        mean: mu, ``(C,)``, in the dtype of ``x`` as all that follow.
        variance: ``sigma^2 - eps``, ``(C,)``.
        weight: gamma, ``(C,)``.
        eps: Added to the variance.
        needs_dx: Whether dx is computed.

    Returns:
        dx in shape, dtype and layout of ``x``, or None, and d gamma and d beta, ``(C,)`` each.
    """
    library = _SOURCE.compiled(x.dtype)
    assert library is not None
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    dx, gradients = torch.empty_like(x) if needs_dx else None, torch.empty(2, layout[1], dtype=x.dtype)
    addresses = [None if t is None else t.data_ptr() for t in (dy, x, dx, mean, variance, weight)]
    library.backward(*addresses, eps, *layout, torch.get_num_threads(), gradients.data_ptr())
    d_gamma, d_beta = gradients.unbind()
    return dx, d_gamma, d_beta
