"""The step of batch normalization preconditioning in C; see the source of the same name."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.methods.kernels.choice import kernels
from normkit.methods.kernels.compiled import Source
from normkit.methods.kernels.layout import lie_alike

_SOURCE = Source(Path(__file__).with_suffix(".c"), advance="ipppdiddppppppp", transform="ippppppppdi")


def advance(
    first: Tensor,
    fan_in: Tensor,
    flat: Tensor,
    running: Sequence[Tensor],
    *,
    decay: float,
    pooled: bool,
    eps_relative: float,
    eps: float,
) -> Sequence[Tensor] | None:
    """Move the running statistics in place by the rows of a step; what ``RowStatistics.advance`` computes of them.

    Args:
        first: The first feature of each layer, and behind them the number of all.
        fan_in: Of each layer, float64, as all that follow.
        flat: Rows and output positions of each layer, then sum and sum of squares of each feature.
        running: Running mean and variance per feature and steps per layer.
        decay: Decay per step.
        pooled: Whether the statistics are those of all rows.
        eps_relative: Guard of the variances relative to the largest of the layer.
        eps: Absolute guard.

    Returns:
        Mean, guarded variance, divisor and ``known`` of the step; None where the kernel cannot run.
    """
    library = _SOURCE.compiled(torch.float64) if kernels(flat, *running) == "c" else None
    if library is None:
        return None
    layers, features = len(fan_in), len(running[0])
    used = torch.empty(2 * (features + layers), dtype=torch.float64).split([features, features, layers, layers])
    inputs, outputs = (first, fan_in, flat), (*running, *used)
    options = decay, pooled, eps_relative, eps
    library.advance(layers, *(t.data_ptr() for t in inputs), *options, *(t.data_ptr() for t in outputs))
    return used


class LayerShape(NamedTuple):
    """What the kernel must know of a layer.

    Attributes:
        place: Its place among the layers that step together.
        groups: Groups of the convolution.
        units: Output units of a group.
        inputs: Input channels of a group.
        taps: Kernel positions.
        taps_first: Whether the channels of a tap lie side by side.
        centred: Whether it has no bias and nothing behind it removes the mean.
    """

    place: int
    groups: int
    units: int
    inputs: int
    taps: int
    taps_first: bool
    centred: bool


def transforms(weight: Tensor, grad: Tensor, bias_grad: Tensor | None) -> bool:
    """Return whether the kernel can transform these gradients: rows of one type that lie in one line of memory."""
    tensors = (grad, weight) if bias_grad is None else (grad, weight, bias_grad)
    if kernels(*tensors) != "c" or any(t.dtype != grad.dtype for t in tensors):
        return False
    return (
        lie_alike(grad, weight)
        and (bias_grad is None or bias_grad.is_contiguous())
        and _SOURCE.compiled(grad.dtype) is not None
    )


class Layers:
    """Layers whose gradients the kernel transforms together.

    Args:
        dtype: Their type.
        shapes: Their shapes.
    """

    def __init__(self, dtype: torch.dtype, shapes: Sequence[LayerShape]) -> None:
        self._library = _SOURCE.compiled(dtype)
        self._shapes = array("q", [number for shape in shapes for number in shape])

    def transform_(
        self,
        steps: Sequence[tuple[int, Tensor, Tensor, Tensor | None, Tensor | float | None]],
        first: Tensor,
        preconditioners: Sequence[Tensor],
        max_change: float | None,
    ) -> None:
        """Precondition the gradients, bound them where ``max_change`` and the rate are given.

        Args:
            steps: Of each layer its place, weight, gradient, gradient of the bias or None, and rate or None.
            first: The first feature of each place, and behind them the number of all.
            preconditioners: Mean and guarded variance of each feature, divisor and ``known`` of each place, float64.
            max_change: Largest change of a unit's output, relative to its deviation; None for no bound.
        """
        assert self._library is not None
        addresses, reach, changed = array("q"), array("d"), []
        for _, weight, grad, bias, rate in steps:
            changed.append(grad)
            if bias is not None:
                changed.append(bias)
            addresses.extend((grad.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()))
            reach.append(0.0 if rate is None else float(rate))
        self._library.transform(
            len(steps),
            *(numbers.buffer_info()[0] for numbers in (self._shapes, addresses, reach)),
            *(t.data_ptr() for t in (first, *preconditioners)),
            max_change or 0.0,
            torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(changed)
