"""Curvature of the loss: along the gradient, the largest eigenvalue and the trace of the Hessian.

Products of the Hessian with a vector are central differences of gradients. They need no second derivative of any layer,
so they work with batch normalization in train mode, custom backward passes and compiled models alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normkit.inspection.forward import in_order
from normkit.inspection.probe import Objective, Probe, dot, norm
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalue and trace of one block of the Hessian.

    Attributes:
        lambda_max: Largest eigenvalue, or None when not asked for.
        residual: ``|H v - lambda v| / |lambda|`` of the eigenvector found: how far the iteration is from its end.
        trace: Hutchinson's estimate of the trace, or None when not asked for.
        trace_error: Its standard error (None for a single sample).
        vector: The eigenvector found, from which a later measurement starts.
    """

    lambda_max: float | None = None
    residual: float | None = None
    trace: float | None = None
    trace_error: float | None = None
    vector: tuple[Tensor, ...] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Curvature(Result):
    """Curvature of the loss of one batch.

    Attributes:
        loss: Loss.
        gradient_norm: ``|g|``.
        directional: ``h = u^T H u`` with ``u = g/|g|``.
        stability: ``lr h / 2``: above 1 a gradient step overshoots along its own direction. None without ``lr``.
        whole: Spectrum of the whole Hessian.
        layers: Spectrum of each layer's diagonal block, when asked for.
    """

    loss: float
    gradient_norm: float
    directional: float
    stability: float | None
    whole: Spectrum
    layers: dict[str, Spectrum] = field(default_factory=dict)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the largest eigenvalue of each layer, or of the whole."""
        ax = axes(ax)
        bars = {name: s.lambda_max for name, s in (self.layers or {"whole": self.whole}).items() if s.lambda_max}
        bars = bars or {"along the gradient": self.directional}
        ax.bar(list(bars), list(bars.values()))
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, f"curvature along the gradient {self.directional:.3g}", "", "largest eigenvalue")


def curvature(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    lr: float | None = None,
    power_iterations: int = 0,
    trace_samples: int = 0,
    per_layer: bool = False,
    start: Curvature | None = None,
    seed: int = 0,
) -> Curvature:
    """Measure the curvature of the loss of one batch, in the modes the model is in.

    Costs 3 forward and backward passes; 2 more for each power iteration and each trace sample, and these for every
    layer when ``per_layer``.

    Args:
        model: Any module.
        objective: ``loss = objective(model, batch)``.
        batch: The batch.
        lr: Learning rate, for the stability ratio.
        power_iterations: Largest number of iterations for the largest eigenvalue; 0 leaves it out. They stop early at a
            residual of 1e-3.
        trace_samples: Random vectors for the trace; 0 leaves it out.
        per_layer: Eigenvalue and trace of every layer's block instead of the whole.
        start: An earlier measurement of this model, whose eigenvectors are a good start.
        seed: Of the random vectors.

    Returns:
        The measurement.

    Examples:
        >>> point = nn.Linear(2, 1, bias=False)
        >>> bowl = lambda m, _: (m.weight.square() * torch.tensor([1.0, 3.0])).sum() / 2
        >>> found = curvature(point, bowl, None, power_iterations=50, trace_samples=2)
        >>> round(found.whole.lambda_max, 2), round(found.whole.trace, 2)
        (3.0, 4.0)
    """
    with Probe(model, objective, batch) as probe:
        loss, gradient = probe.gradients()
        directional = along(probe, gradient)
        blocks: dict[str, Sequence[Tensor]] = {"": probe.parameters}
        if per_layer:
            own = {owner.path: [p for p in owner.parameters if p.requires_grad] for owner in in_order(probe)}
            blocks = {name: parameters for name, parameters in own.items() if parameters}
        spectra = {}
        for name, parameters in blocks.items():
            earlier = (start.layers.get(name) if per_layer else start.whole) if start else None
            generator = torch.Generator().manual_seed(seed)
            vector = list(earlier.vector) if earlier and earlier.vector else _gaussian(parameters, generator)
            top = _largest(probe, parameters, vector, power_iterations) if power_iterations else {}
            trace = _trace(probe, parameters, trace_samples, generator) if trace_samples else {}
            spectra[name] = Spectrum(**top, **trace)
    return Curvature(
        loss,
        norm(gradient),
        directional,
        None if lr is None else lr * directional / 2,
        Spectrum() if per_layer else spectra[""],
        spectra if per_layer else {},
    )


def hessian_product(probe: Probe, vector: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    r"""``H v`` by a central difference: ``(grad L(theta + t v) - grad L(theta - t v)) / (2 t)``.

    The step is a small fraction of the weights' own norm, large enough for the rounding of the gradients.
    """
    length = norm(vector)
    if length == 0:
        return [torch.zeros_like(v) for v in vector]
    scale = norm([p.detach() for p in parameters]) or 1.0
    t = torch.finfo(parameters[0].dtype).eps ** (1 / 3) / 4 * scale / length
    probe.move(vector, t, parameters)
    _, ahead = probe.gradients(parameters)
    probe.move(vector, -t, parameters)
    _, behind = probe.gradients(parameters)
    probe.place({})
    return [(a - b) / (2 * t) for a, b in zip(ahead, behind, strict=True)]


def along(probe: Probe, gradient: Sequence[Tensor]) -> float:
    """``u^T H u`` with ``u = g/|g|``."""
    square = dot(gradient, gradient)
    return dot(gradient, hessian_product(probe, gradient, probe.parameters)) / square if square else 0.0


def _gaussian(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random vectors of independent entries, of complex parameters independent real and imaginary parts."""
    shapes = [(*p.shape, 2) if p.is_complex() else p.shape for p in parameters]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(torch.view_as_complex(d) if p.is_complex() else d).to(p) for d, p in zip(drawn, parameters, strict=True)]


def _signs(vector: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_complex(torch.view_as_real(v).sign()) if v.is_complex() else v.sign() for v in vector]


def _largest(probe: Probe, parameters: Sequence[Tensor], vector: list[Tensor], iterations: int) -> dict[str, Any]:
    """Power iteration; where it ends at a negative eigenvalue, again with the spectrum shifted above zero."""
    value, residual, shift = 0.0, 0.0, 0.0
    for _ in range(iterations):
        length = norm(vector) or 1.0
        vector = [v / length for v in vector]
        product = hessian_product(probe, vector, parameters)
        value = dot(vector, product)
        rest = norm([a - value * v for a, v in zip(product, vector, strict=True)])
        residual = rest / abs(value) if value else 0.0
        converged = residual < 1e-3
        if converged and (value > 0 or shift or rest == 0):
            break
        if converged:
            shift = -value
        vector = [a + shift * v for a, v in zip(product, vector, strict=True)]
    return {"lambda_max": value, "residual": residual, "vector": tuple(vector)}


def _trace(probe: Probe, parameters: Sequence[Tensor], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """Hutchinson's estimator with random signs."""
    found = []
    for _ in range(samples):
        signs = _signs(_gaussian(parameters, generator))
        found.append(dot(signs, hessian_product(probe, signs, parameters)))
    values = torch.tensor(found, dtype=torch.float64)
    error = (values.std() / samples**0.5).item() if samples > 1 else None
    return {"trace": values.mean().item(), "trace_error": error}
