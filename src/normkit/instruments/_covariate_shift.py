"""Internal covariate shift: what an update of the earlier layers does to a layer's gradient.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from normkit.inspection.forward import in_order
from normkit.inspection.norms import is_norm
from normkit.inspection.probe import Objective, Probe, dot, norm, unwrap
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerShift:
    """The covariate shift of one layer.

    Attributes:
        layer: Its path in the model.
        difference: ``|G - G'|``.
        cosine: Cosine of the angle between G and G'.
        gradient_norm: ``|G|``.
    """

    layer: str
    difference: float
    cosine: float
    gradient_norm: float

    @property
    def relative(self) -> float:
        """``|G - G'| / |G|``."""
        return self.difference / self.gradient_norm if self.gradient_norm else 0.0


@dataclass(frozen=True)
class CovariateShift(Result):
    """The covariate shift of every layer, in the order in which the layers run.

    Attributes:
        layers: One entry per layer, in that order.
    """

    layers: tuple[LayerShift, ...]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw relative difference and cosine per layer."""
        ax = axes(ax)
        names = [shift.layer for shift in self.layers]
        ax.plot(names, [shift.relative for shift in self.layers], marker="o", label="|G - G'| / |G|")
        ax.plot(names, [shift.cosine for shift in self.layers], marker="s", label="cos(G, G')")
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, "internal covariate shift", "layer", "")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy all parameters, to be called right before ``optimizer.step()``.

    Args:
        model: The model.

    Returns:
        A copy of every parameter, by its path.
    """
    return {name: p.detach().clone() for name, p in unwrap(model).named_parameters()}


def covariate_shift(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    before: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
) -> CovariateShift:
    r"""Compare each layer's gradient before and after the layers before it were updated.

    For layer i and the same batch: ``G`` is the gradient at the old weights, ``G'`` the gradient when the layers that
    run before layer i have their new weights already. Call it after ``optimizer.step()``: then the model holds the new
    weights and ``before`` the old ones, and it is the update that the optimizer really made. Scale and shift of a
    normalization are updated with the layers before it, and are not reported themselves. It costs one forward and
    backward pass per layer.

    Args:
        model: Any module, after the update.
        objective: ``loss = objective(model, batch)``.
        batch: The batch; the one the update was made with is the paper's choice.
        before: [`normkit.instruments.snapshot`][] from before the update.
        layers: Paths of the layers to report, default all that own weights.

    Returns:
        The measurement.

    Raises:
        ValueError: ``before`` does not fit the model, or a layer is unknown or not run.
    """
    with Probe(model, objective, batch) as probe:
        named = dict(probe.model.named_parameters())
        if before.keys() != named.keys():
            odd = ", ".join(sorted(before.keys() ^ named.keys())[:3])
            raise ValueError(f"before does not fit the model's parameters ({odd}); take instruments.snapshot(model)")
        old = {parameter: before[name] for name, parameter in named.items()}
        order = in_order(probe)
        wanted = {
            owner.path: [p for p in owner.parameters if p.requires_grad]
            for owner in order
            if (owner.path in layers if layers is not None else not is_norm(owner.module))
        }
        wanted = {name: own for name, own in wanted.items() if own}
        if missing := set(layers or ()) - wanted.keys():
            raise ValueError(f"layers {sorted(missing)} have no trainable parameters of their own or are not run")
        if not wanted and layers is not None:
            return CovariateShift(())
        probe.place(old)
        _, gradients = probe.gradients([p for own in wanted.values() for p in own])
        first = iter(gradients)
        updated: set[Tensor] = set()
        shifts = []
        for name, _, parameters in order:
            if own := wanted.get(name):
                g = [next(first) for _ in own]
                probe.place({p: value for p, value in old.items() if p not in updated or p in set(own)})
                _, after = probe.gradients(own) if updated else (0.0, g)
                shifts.append(_compare(name, g, after))
            updated.update(parameters)
    return CovariateShift(tuple(shifts))


def _compare(layer: str, g: list[Tensor], after: list[Tensor]) -> LayerShift:
    size, other = norm(g), norm(after)
    cosine = dot(g, after) / (size * other) if size and other else 1.0
    return LayerShift(layer, norm([a - b for a, b in zip(g, after, strict=True)]), cosine, size)
