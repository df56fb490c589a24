"""Condition numbers of the layers' inputs: raw, centred and preconditioned.

With ``h^ = [1; h]`` the Hessian of the loss in one unit's weights and bias is ``E[l'' h^ h^^T]``; where ``l''`` varies
little, the condition number of ``M = E[h^ h^^T]`` says how slow gradient descent is. Gradients that are multiplied by
``P P^T``, where P centres by a mean and divides by a deviation, descend as if it were that of ``P^T M P``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.inspection.forward import watched
from normkit.inspection.norms import PRODUCERS
from normkit.inspection.probe import Objective, Probe, undisturbed
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
        patches: Whether a convolution's features are whole patches; grouped and very wide ones count channels only.
        rows: Rows observed.
        dead: Features that never changed; they are left out of the matrix.
        raw: ``kappa(E[h^ h^^T])``.
        centred: The same of ``h - mean``: of the mean-centred covariance beside the constant 1.
        preconditioned: ``kappa(P^T E[h^ h^^T] P)`` with the mean and variance that the layer's gradients are preconditioned by;
            None where none were given.
    """

    layer: str
    features: int
    patches: bool
    rows: int
    dead: int
    raw: float
    centred: float
    preconditioned: float | None

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
        """Draw the condition numbers per layer."""
        ax = axes(ax)
        names = [found.layer for found in self.layers]
        for kind, marker in (("raw", "o"), ("centred", "s"), ("preconditioned", "^")):
            values = [getattr(found, kind) for found in self.layers]
            if any(value is not None for value in values):
                ax.plot(names, [math.nan if v is None else v for v in values], marker=marker, label=kind)
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
    preconditioners: Mapping[str, tuple[Tensor, ...]] | None = None,
) -> Conditioning:
    """Measure condition numbers of the layers' inputs over some batches: raw, centred and, given preconditioners, preconditioned.

    Args:
        model: Any module, in the mode it is trained in.
        objective: ``loss = objective(model, batch)``.
        batches: Batches; together they should give ten rows per feature.
        layers: Paths of linear or convolution layers, default all of them.
        preconditioners: For paths of layers, mean and guarded variance per input feature or channel, by which the gradients are
            preconditioned: for BNP ``normkit.handle(optimizer).preconditioners()`` after a step.

    Returns:
        The measurement.

    Raises:
        ValueError: A layer is not there, no batch was given, or a preconditioner is of another number of features.
    """
    found: dict[str, _Gram] = {}

    def look(name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        if (x := tensor_in(inputs)) is not None:
            rows, patches = _rows(module, x)
            found.setdefault(name, _Gram()).add(rows, patches)

    known: dict[str, nn.Module] = {}
    for batch in undisturbed(model, batches):
        with Probe(model, objective, batch) as probe:
            known = {n: m for n, m in probe.model.named_modules() if isinstance(m, PRODUCERS)}
            if missing := set(layers or ()) - known.keys():
                raise ValueError(f"layers {sorted(missing)} are no linear or convolution layers of the model")
            with watched([(n, m) for n, m in known.items() if layers is None or n in layers], look):
                probe.loss()
    if not found:
        raise ValueError("batches: no batch reached a linear or convolution layer")
    given = {
        name if name in known else _unwrapped(name): statistics for name, statistics in (preconditioners or {}).items()
    }
    if unknown := given.keys() - known.keys():
        raise ValueError(f"preconditioners: {sorted(unknown)} are no linear or convolution layers of the model")
    return Conditioning(tuple(_measure(name, gram, given.get(name)) for name, gram in found.items()))


def _unwrapped(path: str) -> str:
    """The path of a layer within the model that is compiled or data parallel."""
    while path.startswith(("_orig_mod.", "module.")):
        path = path.partition(".")[2]
    return path


def _rows(module: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """The rows that the layer's weights meet: inputs, or patches with the zeros that are padded or inserted."""
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1]), False
    spatial = len(module.kernel_size)
    x = x if x.ndim == spatial + 2 else x.unsqueeze(0)
    if x.shape[1] * math.prod(module.kernel_size) > _LARGEST or module.groups > 1:
        return x.movedim(1, -1).reshape(-1, x.shape[1]), False
    strides = module.stride
    if isinstance(module, _ConvTransposeNd):
        x, strides = _inserted(module, x), (1,) * spatial
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, strides, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, *out, *kernel) -> (N * out, C * kernel)
    x = x.movedim(1, 1 + spatial)
    return x.reshape(x.shape[: 1 + spatial].numel(), -1), True


def _inserted(module: _ConvTransposeNd, x: Tensor) -> Tensor:
    """The input over which a transposed convolution moves with stride 1: zeros between its positions and around them."""
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)))
    wide[(..., *(slice(None, None, s) for s in module.stride))] = x
    pads = []
    for d in reversed(range(len(module.kernel_size))):
        edge = module.dilation[d] * (module.kernel_size[d] - 1) - int(module.padding[d])
        pads += [edge, edge + module.output_padding[d]]
    return F.pad(wide, pads)


def _measure(name: str, gram: _Gram, preconditioner: tuple[Tensor, ...] | None) -> LayerConditioning:
    mean, second = gram.total / gram.count, gram.outer / gram.count
    covariance = second - torch.outer(mean, mean)
    variance = covariance.diagonal()
    # rounding of a constant feature leaves about 1e-16 of its square
    alive = variance > 1e-12 * second.diagonal()
    raw = _bordered(second[alive][:, alive], mean[alive])
    covariance = covariance[alive][:, alive]
    preconditioned = None
    if preconditioner is not None:
        shift, deviation = _metric(name, preconditioner, mean)
        shift, deviation = shift[alive], deviation[alive]
        remaining = covariance + torch.outer(shift, shift)
        preconditioned = _kappa(_bordered(remaining / torch.outer(deviation, deviation), shift / deviation))
    return LayerConditioning(
        name,
        len(mean),
        gram.patches,
        gram.count,
        int((~alive).sum()),
        _kappa(raw),
        _kappa(_bordered(covariance, torch.zeros_like(covariance[0]))),
        preconditioned,
    )


def _metric(name: str, preconditioner: tuple[Tensor, ...], mean: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of ``mean``, and the standard deviations that are divided by; those of a channel serve all its taps.

    Raises:
        ValueError: The features do not fit.
    """
    center, variance = (t.to(mean.device, mean.dtype) for t in preconditioner[:2])
    if len(mean) % len(center):
        raise ValueError(
            f"preconditioners: that of {name!r} is of {len(center)} features, the layer has {len(mean)}; give those of this "
            "very model"
        )
    taps = len(mean) // len(center)
    return mean - center.repeat_interleave(taps), variance.sqrt().repeat_interleave(taps)


def _bordered(matrix: Tensor, border: Tensor) -> Tensor:
    """The matrix with the feature 1 in front."""
    one = matrix.new_ones(1, 1)
    return torch.cat([torch.cat([one, border[None]], 1), torch.cat([border[:, None], matrix], 1)])


def _kappa(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix.cpu())
    low, high = values[0].item(), values[-1].item()
    return high / low if low > 0 else float("inf")
