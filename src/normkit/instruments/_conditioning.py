"""Condition numbers of the layers' inputs: what preconditioning with their mean and variance would gain.

With ``h^ = [1; h]`` the Hessian of the loss in one unit's weights and bias is ``E[l'' h^ h^^T]``; where ``l''`` varies
little, the condition number of ``M = E[h^ h^^T]`` says how slow gradient descent is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.inspection.forward import watched
from normkit.inspection.norms import PRODUCERS
from normkit.inspection.probe import Objective, Probe
from normkit.inspection.record import tensor_in
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST = 1024  # features; beyond, patches give way to channels: the eigenvalues of a 4608 x 4608 matrix take minutes


@dataclass(frozen=True)
class LayerConditioning:
    """Condition numbers of the input of one layer.

    Attributes:
        layer: Its path in the model.
        features: Features in the matrix: inputs of a linear layer, values of a patch of a convolution.
        patches: Whether a convolution's features are whole patches; grouped, transposed and very wide ones count
            channels only.
        rows: Rows observed.
        dead: Features that never changed; they are left out of the matrix.
        raw: ``kappa(E[h^ h^^T])``.
        centred: The same of ``h - mean``: of the mean-centred covariance beside the constant 1.
        preconditioned: ``kappa(Corr(h))``, what is left after division by the standard deviations too.
    """

    layer: str
    features: int
    patches: bool
    rows: int
    dead: int
    raw: float
    centred: float
    preconditioned: float

    @property
    def enough_rows(self) -> bool:
        """Whether there were at least ten rows per feature; with fewer the condition numbers are too large."""
        return self.rows >= 10 * (self.features - self.dead)


@dataclass(frozen=True)
class Conditioning(Result):
    """Condition numbers of the inputs of all linear and convolution layers.

    Attributes:
        layers: One entry per layer.
    """

    layers: tuple[LayerConditioning, ...]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the three condition numbers per layer."""
        ax = axes(ax)
        names = [found.layer for found in self.layers]
        for kind, marker in (("raw", "o"), ("centred", "s"), ("preconditioned", "^")):
            ax.plot(names, [getattr(found, kind) for found in self.layers], marker=marker, label=kind)
        ax.set_yscale("log")
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, "conditioning of the layers' inputs", "layer", "condition number")


class _Gram:
    """Sums of rows and of their outer products, in float64."""

    def __init__(self) -> None:
        self.count, self.patches = 0, False
        self.total = self.outer = torch.zeros(())

    def add(self, rows: Tensor, patches: bool) -> None:
        rows = rows.double()
        self.count, self.patches = self.count + rows.shape[0], patches
        self.total, self.outer = self.total + rows.sum(0), self.outer + rows.T @ rows


def conditioning(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
) -> Conditioning:
    """Condition numbers of the layers' inputs over some batches, raw, centred and preconditioned.

    Args:
        model: Any module, in the mode it is trained in.
        objective: ``loss = objective(model, batch)``.
        batches: Batches; together they should give ten rows per feature.
        layers: Paths of linear or convolution layers, default all of them.

    Returns:
        The measurement.

    Raises:
        ValueError: A layer is not there, or no batch was given.
    """
    found: dict[str, _Gram] = {}

    def look(name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        if (x := tensor_in(inputs)) is not None:
            rows, patches = _rows(module, x)
            found.setdefault(name, _Gram()).add(rows, patches)

    batches = iter(batches)
    for batch in batches:
        with Probe(model, objective, batch) as probe, torch.no_grad():
            known = {n: m for n, m in probe.model.named_modules() if isinstance(m, PRODUCERS)}
            if missing := set(layers or ()) - known.keys():
                raise ValueError(f"layers {sorted(missing)} are no linear or convolution layers of the model")
            with watched([(n, m) for n, m in known.items() if layers is None or n in layers], look):
                probe.loss()
    if not found:
        raise ValueError("batches: no batch reached a linear or convolution layer")
    return Conditioning(tuple(_measure(name, gram) for name, gram in found.items()))


def _rows(module: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """The rows that the layer's weights meet: inputs, or patches with their zero padding."""
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1]), False
    spatial = len(module.kernel_size)
    x = x if x.ndim == spatial + 2 else x.unsqueeze(0)
    taps = 1
    for k in module.kernel_size:
        taps *= k
    wide = x.shape[1] * taps > _LARGEST
    if wide or module.groups > 1 or isinstance(module, _ConvTransposeNd):
        return x.movedim(1, -1).reshape(-1, x.shape[1]), False
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, *out, *kernel) -> (N * out, C * kernel)
    x = x.movedim(1, 1 + spatial)
    return x.reshape(x.shape[: 1 + spatial].numel(), -1), True


def _measure(name: str, gram: _Gram) -> LayerConditioning:
    mean, second = gram.total / gram.count, gram.outer / gram.count
    covariance = second - torch.outer(mean, mean)
    variance = covariance.diagonal()
    # rounding of a constant feature leaves about 1e-16 of its square
    alive = variance > 1e-12 * second.diagonal()
    raw = _bordered(second[alive][:, alive], mean[alive])
    covariance, variance = covariance[alive][:, alive], variance[alive]
    deviation = variance.sqrt()
    return LayerConditioning(
        name,
        len(mean),
        gram.patches,
        gram.count,
        int((~alive).sum()),
        _kappa(raw),
        _kappa(_bordered(covariance, torch.zeros_like(variance))),
        _kappa(_bordered(covariance / torch.outer(deviation, deviation), torch.zeros_like(variance))),
    )


def _bordered(matrix: Tensor, border: Tensor) -> Tensor:
    """The matrix with the feature 1 in front."""
    one = matrix.new_ones(1, 1)
    return torch.cat([torch.cat([one, border[None]], 1), torch.cat([border[:, None], matrix], 1)])


def _kappa(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix.cpu())
    low, high = values[0].item(), values[-1].item()
    return high / low if low > 0 else float("inf")
