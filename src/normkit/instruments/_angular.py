"""Measure how fast scale-invariant weights turn: effective learning rate, and angle per step against the equilibrium.

A filter before a per-channel normalization matters by its direction alone. Its gradient is orthogonal to it and makes
it longer, weight decay makes it shorter, and where both balance it turns by a fixed angle per step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import SGD, AdamW, Optimizer

from normkit.inspection.graph import producers
from normkit.inspection.norms import statistics_of
from normkit.inspection.probe import unwrap
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerAngle:
    """The filters of one scale-invariant weight; every figure is the median over them.

    Attributes:
        layer: Path of the layer.
        weight_norm: ``|w|``.
        effective_lr: ``eta / |w|^2``, the learning rate of the direction.
        angle: Angle of the last step in radians.
        equilibrium: Angle per step in equilibrium, for SGD and AdamW with weight decay; None for all else.
    """

    layer: str
    weight_norm: float
    effective_lr: float
    angle: float
    equilibrium: float | None


@dataclass(frozen=True)
class Angular(Result):
    """Rotation per step of the scale-invariant weights.

    Attributes:
        layers: One entry per scale-invariant weight.
    """

    layers: tuple[LayerAngle, ...]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw angle and equilibrium per layer."""
        ax = axes(ax)
        names = [found.layer for found in self.layers]
        ax.plot(names, [found.angle for found in self.layers], marker="o", label="angle per step")
        if any(found.equilibrium for found in self.layers):
            balance = [float("nan") if found.equilibrium is None else found.equilibrium for found in self.layers]
            ax.plot(names, balance, marker="_", linestyle=":", label="equilibrium")
        ax.set_yscale("log")
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, "rotation of the weights", "layer", "radians")


def equilibrium(optimizer: Optimizer, group: Mapping[str, Any]) -> float | None:
    r"""Return the angle per step at which growth by the gradient and shrinkage by weight decay balance.

    SGD with momentum alpha: ``sqrt(2 eta lambda / (1 + alpha))``; AdamW: ``sqrt(2 eta lambda (1 - b1) / (1 + b1))``.

    Args:
        optimizer: The optimizer.
        group: One of its parameter groups.

    Returns:
        The angle in radians; None for other optimizers and without weight decay.

    Examples:
        >>> sgd = SGD([torch.zeros(1)], lr=0.1, weight_decay=5e-4)
        >>> round(equilibrium(sgd, sgd.param_groups[0]), 4)
        0.01
    """
    product = 2 * float(group["lr"]) * float(group.get("weight_decay", 0.0))
    if product == 0:
        return None
    if type(optimizer) is SGD:
        return sqrt(product / (1 + group["momentum"]))
    if type(optimizer) is AdamW:
        b1 = float(group["betas"][0])
        return sqrt(product * (1 - b1) / (1 + b1))
    return None


def angular(model: nn.Module, optimizer: Optimizer, before: Mapping[str, Tensor]) -> Angular:
    """Compare the weights with those before the last step.

    Looked at are the linear and convolution layers whose output goes into a batch (or l_p) normalization and nowhere
    else, filter by filter; filters of zeros have no direction and are left out.

    Args:
        model: Any module, right after ``optimizer.step()``.
        optimizer: The optimizer that made the step.
        before: [`normkit.instruments.snapshot`][] from before the step.

    Returns:
        The measurement.
    """
    return rotation(unwrap(model), optimizer, before, producers(unwrap(model)))


@torch.no_grad()
def rotation(
    model: nn.Module, optimizer: Optimizer, before: Mapping[str, Tensor], fed_by: Mapping[str, str]
) -> Angular:
    """[`normkit.instruments.angular`][] of a bare model whose layers before each normalization are known already."""
    modules, groups = dict(model.named_modules()), {p: g for g in optimizer.param_groups for p in g["params"]}
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for norm_path, path in fed_by.items():
        if statistics_of(modules[norm_path]) != "batch":
            continue
        weight = modules[path]._parameters.get("weight")
        if weight is None or weight not in groups:  # parametrized, or not trained
            continue
        group = groups[weight]
        dim = 1 if isinstance(modules[path], _ConvTransposeNd) else 0
        new, old = (w.double().movedim(dim, 0).flatten(1) for w in (weight, before[names[weight]]))
        turned = (new != 0).any(1) & (old != 0).any(1)
        if not turned.any():
            continue  # filters of zeros have no direction
        new, old = new[turned], old[turned]
        length = new.norm(dim=1)
        # atan2 of the two projections keeps tiny angles, where acos would lose them
        unit = old / old.norm(dim=1, keepdim=True)
        along = (new * unit).sum(1)
        angle = torch.atan2((new - along[:, None] * unit).norm(dim=1), along)
        found.append(
            LayerAngle(
                path,
                length.median().item(),
                (float(group["lr"]) / length.square()).median().item(),
                angle.median().item(),
                equilibrium(optimizer, group),
            )
        )
    return Angular(tuple(found))
