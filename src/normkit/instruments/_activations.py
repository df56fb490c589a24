"""Mean and variance of every layer's output: how stable the distributions are that the next layers see.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from normkit import moments
from normkit.inspection.forward import watched
from normkit.inspection.graph import layers
from normkit.inspection.norms import feature_dim
from normkit.inspection.probe import Objective, Probe
from normkit.inspection.record import tensor_in
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Activations(Result):
    """Mean and variance per channel of the output of every normalization, linear and convolution layer.

    Attributes:
        means: Path of the layer -> mean of each channel.
        variances: Path of the layer -> variance of each channel.
    """

    means: dict[str, tuple[float, ...]]
    variances: dict[str, tuple[float, ...]]

    def drift(self, earlier: "Activations") -> dict[str, tuple[float, float]]:
        """Per layer, mean over the channels of ``|mu - mu_earlier|`` and of ``|var - var_earlier|``."""
        return {
            layer: (
                _distance(self.means[layer], earlier.means[layer]),
                _distance(self.variances[layer], earlier.variances[layer]),
            )
            for layer in self.means
        }

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw mean and variance of every layer, averaged over its channels."""
        ax = axes(ax)
        for values, name in ((self.means, "mean"), (self.variances, "variance")):
            ax.plot(list(values), [sum(v) / len(v) for v in values.values()], marker="o", label=name)
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, "activations", "layer", "mean over channels")


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def activations(model: nn.Module, objective: Objective, batch: Any, *, at: Sequence[str] | None = None) -> Activations:
    """Measure the outputs of the layers in one forward pass, in the modes the model is in.

    Args:
        model: Any module.
        objective: ``loss = objective(model, batch)``.
        batch: The batch; the same one at every measurement makes them comparable.
        at: Paths of modules whose outputs to look at, default all normalization, linear and convolution layers.

    Returns:
        The measurement.
    """
    means: dict[str, tuple[float, ...]] = {}
    variances: dict[str, tuple[float, ...]] = {}

    def look(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if (y := tensor_in(output)) is not None:
            seen = moments.observe(y, feature_dim(module))
            means[name] = tuple(seen.mean.tolist())
            variances[name] = tuple(seen.variance.tolist())

    with Probe(model, objective, batch) as probe:
        chosen = layers(probe.model) if at is None else [(path, probe.model.get_submodule(path)) for path in at]
        with watched(chosen, look):
            probe.loss()
    return Activations(means, variances)
