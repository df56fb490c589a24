"""Measure how much of the gradient batch normalization removes in the backward pass.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604, theorem 4.1, which is an equality: with ``g = dL/dz`` at the output of a channel with
``m`` values and normalized values ``y^``, the gradient before the layer is

``|dL/dx|^2 = (gamma^2 / sigma^2) (|g|^2 - <1, g>^2 / m - <g, y^>^2 / m)``   (eps = 0).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.inspection.forward import watched
from normkit.inspection.norms import is_noisy, uses_batch_statistics
from normkit.inspection.probe import Objective, Probe
from normkit.inspection.record import tensor_in
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GradientRemoved(Result):
    """The share of the squared gradient that the two projections of batch normalization remove.

    Attributes:
        layers: Path of the layer -> share over all its channels, between 0 and 1.
        channels: Path of the layer -> share of each channel.
    """

    layers: dict[str, float]
    channels: dict[str, tuple[float, ...]]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the share per layer."""
        ax = axes(ax)
        ax.bar(list(self.layers), list(self.layers.values()))
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, "gradient removed by batch normalization", "layer", "share of the squared norm")


def gradient_removed(model: nn.Module, objective: Objective, batch: Any) -> GradientRemoved:
    """Measure ``(<1, g>^2 + <g, y^>^2) / (m |g|^2)`` at every batch normalization that uses the batch's statistics.

    Costs one forward and backward pass. A layer that is called several times shows its last call.

    Args:
        model: Any module in train mode; layers in eval mode remove nothing and are not reported.
        objective: ``loss = objective(model, batch)``.
        batch: The batch.

    Returns:
        The measurement.
    """
    with Probe(model, objective, batch) as probe:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        with watch_gradients(probe, found):
            probe.gradients()
    return removed(found)


def watch_gradients(probe: Probe, found: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """Within the block, store the removed and the whole squared gradient per channel of a backward pass in ``found``."""

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        x, y = tensor_in(inputs), tensor_in(output)
        if x is None or y is None or not y.requires_grad or not isinstance(module, _BatchNorm):
            return
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # squares of half precision underflow
        normalized = F.batch_norm(x, None, None, training=True, eps=module.eps)

        def arrived(g: Tensor) -> None:
            dims = [d for d in range(g.ndim) if d != 1]
            g = g.to(normalized.dtype)
            rows = g.numel() // g.shape[1]
            taken = g.sum(dims).square() + (g * normalized).sum(dims).square()
            found.setdefault(name, (taken / rows, g.square().sum(dims)))  # the last call's gradient arrives first

        y.register_hook(arrived)

    wanted = [
        (name, m)
        for name, m in probe.model.named_modules()
        if isinstance(m, _BatchNorm) and not is_noisy(m) and uses_batch_statistics(m)
    ]
    return watched(wanted, look)


def removed(found: dict[str, tuple[Tensor, Tensor]]) -> GradientRemoved:
    """Return the shares, from what ``watch_gradients`` stored."""
    forward = dict(reversed(found.items()))  # gradients arrive last layer first
    return GradientRemoved(
        {name: (taken.sum() / whole.sum()).nan_to_num(0.0).item() for name, (taken, whole) in forward.items()},
        {name: tuple((taken / whole).nan_to_num(0.0).tolist()) for name, (taken, whole) in forward.items()},
    )
