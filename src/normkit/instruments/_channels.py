"""The state of every channel: running against batch statistics, dead, always-on and eps-dominated channels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normkit.inspection.forward import watched
from normkit.inspection.graph import layers, rectified
from normkit.inspection.norms import Statistics, batch_statistics, feature_dim, is_norm, running_statistics
from normkit.inspection.probe import Objective, Probe
from normkit.inspection.record import tensor_in
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerChannels:
    """The channels of one layer; every tuple has one entry per channel.

    Attributes:
        layer: Its path in the model.
        rows: Values per channel in the batch.
        positive: Share of the outputs above zero.
        expected_positive: ``Phi(beta / |gamma|)``, what a normalized Gaussian would give (empty where not affine).
        rectified: Whether a ReLU, and nothing else, takes the output, so that 0 % positive means dead.
        shift: ``z = (mu_batch - mu_running) / sqrt(var_running + eps)`` (empty without running statistics).
        divergence: KL divergence in nats of the batch's Gaussian from the running one (likewise).
        eps_share: ``eps / (var + eps)`` of the batch (empty for layers without eps).
    """

    layer: str
    rows: int
    positive: tuple[float, ...]
    expected_positive: tuple[float, ...] = ()
    rectified: bool = False
    shift: tuple[float, ...] = ()
    divergence: tuple[float, ...] = ()
    eps_share: tuple[float, ...] = ()

    @property
    def dead(self) -> tuple[int, ...]:
        """Channels that are zero behind their ReLU for the whole batch."""
        return tuple(c for c, p in enumerate(self.positive) if self.rectified and p == 0)

    @property
    def always_on(self) -> tuple[int, ...]:
        """Channels that their ReLU leaves unchanged for the whole batch."""
        return tuple(c for c, p in enumerate(self.positive) if self.rectified and p == 1)

    @property
    def eps_dominated(self) -> tuple[int, ...]:
        """Channels whose variance is smaller than eps."""
        return tuple(c for c, share in enumerate(self.eps_share) if share > 0.5)

    @property
    def mean_divergence(self) -> float:
        """Mean over the channels of the divergence, 0 without running statistics."""
        return sum(self.divergence) / len(self.divergence) if self.divergence else 0.0


@dataclass(frozen=True)
class Channels(Result):
    """The channels of every normalization layer and of every layer before a ReLU.

    Attributes:
        layers: One entry per layer.
    """

    layers: tuple[LayerChannels, ...]

    def summary(self) -> dict[str, dict[str, float]]:
        """The counts per layer, for a log."""
        return {
            found.layer: {
                "divergence": found.mean_divergence,
                "dead": len(found.dead),
                "always_on": len(found.always_on),
                "eps_dominated": len(found.eps_dominated),
            }
            for found in self.layers
        }

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the share of dead, always-on and eps-dominated channels per layer."""
        ax = axes(ax)
        names = [found.layer for found in self.layers]
        for kind, marker in (("dead", "o"), ("always_on", "s"), ("eps_dominated", "^")):
            share = [len(getattr(found, kind)) / len(found.positive) for found in self.layers]
            ax.plot(names, share, marker=marker, label=kind.replace("_", " "))
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, "channels", "layer", "share of channels")


def channels(model: nn.Module, objective: Objective, batch: Any) -> Channels:
    """Examine every channel during one forward pass, in the modes the model is in.

    Args:
        model: Any module.
        objective: ``loss = objective(model, batch)``.
        batch: The batch.

    Returns:
        The measurement.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net[0].bias.data.zero_()
        >>> found = channels(net, lambda m, x: m(x).mean(), torch.tensor([[1.0], [2.0]])).layers[0]
        >>> found.dead, found.always_on
        ((1,), (0,))
    """
    with Probe(model, objective, batch) as probe:
        found: list[LayerChannels] = []
        with watch_channels(probe, rectified(probe.model), found):
            probe.loss()
    return Channels(tuple(found))


def watch_channels(probe: Probe, before_relu: frozenset[str], found: list[LayerChannels]) -> Any:
    """Append the channels of every forward pass within the block to ``found``."""

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        x, y = tensor_in(inputs), tensor_in(output)
        if x is not None and y is not None:
            found.append(_examine(name, module, x, y, name in before_relu, running.get(name)))

    wanted = [(name, m) for name, m in layers(probe.model) if is_norm(m) or name in before_relu]
    # read now: in train mode the forward pass moves them towards the very batch they are compared with
    running = {name: statistics for name, m in wanted if (statistics := running_statistics(m)) is not None}
    return watched(wanted, look)


def _examine(
    name: str, module: nn.Module, x: Tensor, y: Tensor, before_relu: bool, running: Statistics | None
) -> LayerChannels:
    dim = feature_dim(module)
    outputs = y.movedim(dim, -1).reshape(-1, y.shape[dim])
    facts: dict[str, Any] = {}
    if is_norm(module):
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and isinstance(bias, Tensor):
            ratio = (bias.double() / weight.double().abs()).nan_to_num(0.0)
            facts["expected_positive"] = _numbers(torch.special.ndtr(ratio))
        if running is not None:
            batch, share = batch_statistics(module, x)
            shift = (batch.mean - running.mean) / running.variance.sqrt()
            ratio = batch.variance / running.variance
            facts["shift"] = _numbers(shift)
            facts["divergence"] = _numbers((ratio + shift.square() - 1 - ratio.log()) / 2)
            facts["eps_share"] = _numbers(share)
    positive = (outputs > 0).double().mean(0)
    return LayerChannels(name, outputs.shape[0], _numbers(positive), rectified=before_relu, **facts)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().tolist())
