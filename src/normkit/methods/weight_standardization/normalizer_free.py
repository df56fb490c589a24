"""Networks without normalization: scaled weight standardization, SkipInit and adaptive gradient clipping.

High-Performance Large-Scale Image Recognition Without Normalization, Andrew Brock, Soham De, Samuel Smith, Karen Simonyan,
arXiv 2102.06171; scaled weight standardization: Brock, De, Smith, arXiv 2101.08692; SkipInit: De, Smith, arXiv 2002.10444.

    W_hat = gamma g (W - mu) / sqrt(N sigma^2)           every convolution; g is learned, per filter
    h + alpha f(h), alpha = 0 at first                   every residual branch; alpha is a learned scalar
    G_i <- lambda max(|W_i|, eps) / |G_i| G_i            where |G_i| > lambda max(|W_i|, eps), for every unit i, before a step

gamma makes up for the activation in front of the convolution: 1 / sqrt(Var f(x)) for x ~ N(0, 1), sqrt(2 / (1 - 1 / pi)) for
ReLU.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from normkit.inspection.branches import branch_ends, classifiers
from normkit.inspection.forward import check_batches
from normkit.inspection.graph import Dataflow, dataflow
from normkit.inspection.record import record
from normkit.methods.method import Method, Part, Recipe
from normkit.methods.weight_standardization.standardize import (
    FilterParametrization,
    parametrizable,
    parametrize_filters,
    scaled_standardize,
    standardize_weights,
)
from normkit.optim.step_hooks import StepHandle, attach_to_step

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus,
    nn.Tanh, nn.Sigmoid,
)  # fmt: skip
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu, "celu": F.celu, "selu": F.selu,
    "gelu": F.gelu, "silu": F.silu, "mish": F.mish, "hardswish": F.hardswish, "softplus": F.softplus, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # fmt: skip
_KEEP_THE_SCALE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip
_KEEPING = {
    "dropout",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool2d",
    "interpolate",
    "pad",
    "contiguous",
    "cat",
}


@torch.no_grad()
def activation_gain(function: Callable[[Tensor], Tensor]) -> float:
    """Return ``1 / sqrt(Var f(x))`` for ``x ~ N(0, 1)``, by quadrature.

    Args:
        function: An activation that works elementwise.

    Returns:
        The factor that gives its output unit variance.

    Examples:
        >>> round(activation_gain(torch.relu), 4), round((2 / (1 - 1 / torch.pi)) ** 0.5, 4)
        (1.7129, 1.7129)
    """
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    y = function(x)
    mean = (density * y).sum() / density.sum()
    return ((density * (y - mean).square()).sum() / density.sum()).rsqrt().item()


def input_gain(model: nn.Module, path: str, flow: Dataflow) -> float:
    """Return the gain of the activation in front of a layer; 1 where there is none, or it is unknown.

    Dropout, pooling, padding, concatenation and resizing in between are passed over. Activations that are called as
    functions are taken with their default arguments.
    """
    modules = dict(model.named_modules())
    for call in flow.calls(path)[:1]:
        index = call
        while flow.steps[index].inputs:
            index = flow.steps[index].inputs[0]
            step = flow.steps[index]
            layer = modules[step.path] if step.name == "module" and step.path is not None else None
            if isinstance(layer, _ACTIVATIONS):
                return activation_gain(layer)
            if step.name in _FUNCTIONS:
                return activation_gain(_FUNCTIONS[step.name])
            if step.name not in _KEEPING and not isinstance(layer, _KEEP_THE_SCALE):
                break
    return 1.0


class ScaledWeightStandardization(FilterParametrization):
    """``scaled_standardize`` as a parametrization, with a learned gain per filter (arXiv 2102.06171).

    Args:
        layer: The convolution.
        gamma: Gain of the activation in front of it.
        ends_branch: Whether a residual branch ends with it: a learned scalar, zero at first, then multiplies the weight.
    """

    def __init__(self, layer: _ConvNd, gamma: float = 1.0, *, ends_branch: bool = False) -> None:
        super().__init__(layer)
        self.gamma = gamma
        trained = layer.weight.requires_grad
        self.gain = nn.Parameter(layer.weight.new_ones(layer.out_channels), trained)
        self.skip_gain = nn.Parameter(layer.weight.new_zeros(()), trained) if ends_branch else None

    def transform(self, filters: Tensor) -> Tensor:
        """Standardize and scale the filters."""
        factor = self.gain * self.gamma
        return scaled_standardize(filters, factor if self.skip_gain is None else factor * self.skip_gain)

    def extra_repr(self) -> str:
        """The settings."""
        return f"gamma={self.gamma:.4g}, ends_branch={self.skip_gain is not None}"


def normalizer_free(model: nn.Module) -> nn.Module:
    """Standardize and scale the weights of all convolutions; residual branches that end in one start at zero.

    A bias of that last convolution is not multiplied by the branch's scalar.

    Args:
        model: A model whose normalization layers have been removed, changed in place.

    Returns:
        The model.
    """
    flow = dataflow(model)
    ends = set(branch_ends(model, flow))
    for path, layer in parametrizable(model, "normalizer-free"):
        gamma = input_gain(model, path, flow)
        parametrize_filters(layer, ScaledWeightStandardization(layer, gamma, ends_branch=path in ends))
    return model


def unit_norms(x: Tensor, units: tuple[int, ...] = (0,)) -> Tensor:
    """Return the Euclidean length of every unit.

    Args:
        x: A weight or its gradient.
        units: Dimensions that tell the units apart; a bias, a vector of gains or a scalar is one unit.

    Returns:
        Lengths, broadcastable with ``x``.
    """
    if x.ndim < 2:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=[d for d in range(x.ndim) if d not in units], keepdim=True)


@torch.no_grad()
def clip_by_unit_(
    weight: Tensor,
    gradient: Tensor,
    threshold: float | Tensor = 0.01,
    eps: float = 1e-3,
    units: tuple[int, ...] = (0,),
) -> None:
    """Adaptive gradient clipping: shorten the gradient of every unit to ``threshold max(|W_i|, eps)`` at most, in place.

    Args:
        weight: A parameter.
        gradient: Its gradient.
        threshold: lambda.
        eps: Smallest length of a unit, so that those that start at zero can move.
        units: As in ``unit_norms``.

    Examples:
        >>> gradient = torch.tensor([[3.0, 4.0], [0.0, 0.01]])
        >>> clip_by_unit_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), gradient, 0.1)
        >>> gradient
        tensor([[0.0600, 0.0800],
                [0.0000, 0.0100]])
    """
    limit = unit_norms(weight, units).clamp(min=eps) * threshold
    length = unit_norms(gradient, units)
    gradient.mul_(torch.where(length > limit, limit / length.clamp(min=1e-6), 1.0))


def attach_clipping(model: nn.Module, optimizer: Optimizer, threshold: float = 0.01, eps: float = 1e-3) -> StepHandle:
    """Clip all gradients except the linear classifier's by ``clip_by_unit_`` right before every step.

    Args:
        model: The model whose parameters the optimizer steps.
        optimizer: Any torch optimizer that works on one gradient per step.
        threshold: lambda; the paper's 0.01 is for batches of 4096, and smaller batches do with larger ones.
        eps: Smallest length of a unit.

    Returns:
        A handle whose ``remove()`` takes it off.

    Raises:
        ValueError: A number is not positive, or the optimizer does not work on one gradient per step (LBFGS, SAM).
    """
    for name, value in (("threshold", threshold), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"adaptive gradient clipping: {name} is {value}; give a positive number")
    excluded = {parameter for layer in classifiers(model) for parameter in layer.parameters()}
    groups: dict[Tensor, int] = {p: 0 for p in model.parameters() if p not in excluded}
    for layer in model.modules():
        if isinstance(layer, _ConvTransposeNd) and (weight := _trained_weight(layer)) is not None:
            groups[weight] = layer.groups  # its weight is (in, out / groups, ...)
    return attach_to_step(
        optimizer, "adaptive gradient clipping", partial(_clip, groups=groups, threshold=threshold, eps=eps)
    )


def _trained_weight(layer: Any) -> Tensor | None:
    """The parameter behind a layer's weight, None if there are several (weight norm)."""
    if parametrize.is_parametrized(layer, "weight"):
        return getattr(layer.parametrizations.weight, "original", None)
    return layer._parameters.get("weight")


def _clip(optimizer: Optimizer, *, groups: dict[Tensor, int], threshold: float, eps: float) -> None:
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under AMP unscales the gradients itself
    limit = threshold if scale is None else threshold * scale
    for parameter, count in groups.items():
        if parameter.grad is None:
            continue
        if count:
            weight, gradient = (t.detach().unflatten(0, (count, -1)) for t in (parameter, parameter.grad))
            clip_by_unit_(weight, gradient, limit, eps, (0, 2))
        else:
            clip_by_unit_(parameter, parameter.grad, limit, eps)


def standardize_model(model: nn.Module, batches: Iterable[Any] | None) -> nn.Module:
    """:func:`standardize_weights` as a step of a recipe; a model that does not trace is run on the first of ``batches``.

    Raises:
        ValueError: There is none.
    """
    check_batches(batches, "group+ws")
    flow = dataflow(model)
    if flow.opaque and batches is not None:
        for batch in batches:
            flow, _ = record(model, batch)
            break
        else:
            raise ValueError("group+ws: batches is empty; give one batch, or leave it out")
    return standardize_weights(model, flow)


def free_model(model: nn.Module, batches: object) -> nn.Module:
    """:func:`normalizer_free` as a step of a recipe."""
    return normalizer_free(model)


def clip_steps(model: nn.Module, optimizer: Optimizer, **options: float) -> None:
    """:func:`attach_clipping` as a step of a recipe."""
    attach_clipping(model, optimizer, **options)


METHOD = Method(
    recipes=(
        Recipe(
            "group+ws",
            "Group normalization with weight standardization",
            "Qiao et al. 2019, arXiv 1903.10520",
            0.1,
            convert=Part("group"),
            prepare=Part(standardize_model),
            group="Baselines",
        ),
        Recipe(
            "normalizer-free",
            "No normalization: scaled filters, adaptive clipping",
            "Brock et al. 2021, arXiv 2102.06171",
            0.1,
            convert=Part("none"),
            prepare=Part(free_model),
            typed=True,
            attach=Part(clip_steps, "threshold", "eps"),
            group="Baselines",
        ),
    )
)
