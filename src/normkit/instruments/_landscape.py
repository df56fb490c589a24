"""Measure how the loss and its gradient change along the gradient.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from normkit.inspection.probe import Objective, Probe, norm
from normkit.instruments.result import Result, axes, label, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Landscape(Result):
    r"""Loss and gradient at ``theta - eta g`` for step sizes ``eta``, where ``g`` is the gradient at ``theta``.

    Attributes:
        loss: Loss at ``theta``.
        gradient_norm: ``|g|``.
        step_sizes: The step sizes, ascending.
        losses: Loss after each step.
        gradient_changes: ``|grad L(theta - eta g) - g|`` after each step.
    """

    loss: float
    gradient_norm: float
    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_changes: tuple[float, ...]

    @property
    def loss_band(self) -> tuple[float, float]:
        """Smallest and largest loss along the gradient; not finite as soon as one of them is not."""
        return _band(self.losses)

    @property
    def predictiveness(self) -> tuple[float, float]:
        """Smallest and largest change of the gradient; the smaller, the better the gradient predicts the next one."""
        return _band(self.gradient_changes)

    @property
    def slopes(self) -> tuple[float, ...]:
        """Change of the gradient per distance, ``|grad L(theta - eta g) - g| / |eta g|``, for each step size."""
        lengths = [eta * self.gradient_norm for eta in self.step_sizes]
        return tuple(c / d if d else 0.0 for c, d in zip(self.gradient_changes, lengths, strict=True))

    @property
    def beta(self) -> float:
        """Effective beta-smoothness: the largest change of the gradient per distance."""
        return _band(self.slopes)[1]

    @property
    def beta_step_size(self) -> float:
        """The step size at which beta is reached.

        At the smallest step size beta is limited by the resolution of the walk; at a larger one it belongs to the landscape.
        """
        slopes = [slope if slope == slope else math.inf for slope in self.slopes]
        return self.step_sizes[slopes.index(max(slopes))]

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement with the figures that follow from it."""
        return {**super().to_dict(), **plain({"beta": self.beta, "beta_step_size": self.beta_step_size})}

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the loss along the gradient."""
        ax = axes(ax)
        ax.plot(self.step_sizes, self.losses, marker="o")
        ax.axhline(self.loss, color="grey", linestyle=":")
        ax.set_xscale("log")
        return label(ax, f"along the gradient: beta {self.beta:.3g}", "step size", "loss")


def _band(values: tuple[float, ...]) -> tuple[float, float]:
    broken = [v for v in values if not math.isfinite(v)]
    return (min(values), max(values)) if not broken else (min(values, default=math.nan), broken[0])


def landscape(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    lr: float,
    steps: int = 8,
    span: tuple[float, float] = (1 / 8, 4),
) -> Landscape:
    r"""Measure loss and gradient along the gradient of one batch: loss band, predictiveness, beta-smoothness.

    The walk is along the plain gradient ``g = grad L(theta)`` whatever the optimizer makes of it, in the modes the
    model is in (train mode is the paper's). It costs ``steps + 1`` forward and backward passes.

    Args:
        model: Any module.
        objective: ``loss = objective(model, batch)``.
        batch: The batch; the training batch is the paper's choice.
        lr: Learning rate, the unit of ``span``.
        steps: Number of step sizes, spaced evenly in the logarithm.
        span: Smallest and largest step size, in units of ``lr``.

    Returns:
        The measurement.

    Raises:
        ValueError: A step size would not be positive.

    Examples:
        >>> import torch
        >>> point = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(point.weight)
        >>> walk = landscape(point, lambda m, x: 3 * m(x).square().mean() / 2, torch.ones(1, 1), lr=0.1, steps=3)
        >>> round(walk.beta, 4), walk.gradient_norm
        (3.0, 3.0)
    """
    sizes = step_sizes(lr, steps, span)
    with Probe(model, objective, batch) as probe:
        loss, gradient = probe.gradients()
        return walk(probe, loss, gradient, sizes)


def step_sizes(lr: float, steps: int = 8, span: tuple[float, float] = (1 / 8, 4)) -> tuple[float, ...]:
    """Return step sizes from ``span[0] * lr`` to ``span[1] * lr``, evenly spaced in the logarithm.

    Raises:
        ValueError: One of them would not be positive.
    """
    low, high = span
    if not (lr > 0 and 0 < low <= high and steps >= 1):
        raise ValueError(f"lr {lr}, steps {steps}, span {span}: needs lr > 0, steps >= 1 and 0 < span[0] <= span[1]")
    ratio = (high / low) ** (1 / max(steps - 1, 1))
    return tuple(lr * low * ratio**k for k in range(steps))


def walk(probe: Probe, loss: float, gradient: list[Tensor], sizes: tuple[float, ...]) -> Landscape:
    """Measure with a probe that has loss and gradient at ``theta`` already."""
    losses, changes = [], []
    for eta in sizes:
        probe.move(gradient, -eta)
        there, gradient_there = probe.gradients()
        losses.append(there)
        changes.append(norm([a.sub_(b) for a, b in zip(gradient_there, gradient, strict=True)]))
    return Landscape(loss, norm(gradient), sizes, tuple(losses), tuple(changes))
