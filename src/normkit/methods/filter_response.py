"""Filter Response Normalization and the thresholded linear unit: no statistics of the batch, no mean.

Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks, Saurabh Singh,
Shankar Krishnan, CVPR 2020, arXiv 1911.09737. Per sample and channel, with the mean over positions,

    nu^2 = mean(x^2)        y = gamma x / sqrt(nu^2 + eps) + beta        z = max(y, tau)

tau is learned, per channel. Where there is one position, x / sqrt(x^2 + eps) is a smooth sign of x, and eps is learned, too:
``eps = 1e-6 + |epsilon|``.
"""

import logging

import torch
from torch import Tensor, nn

from normkit.inspection.graph import Dataflow, dataflow
from normkit.inspection.markers import Leaf
from normkit.methods.method import Method, Part, Recipe, Successor, layer_target
from normkit.moments import statistics_dtype

_logger = logging.getLogger("normkit")

FIRST_EPSILON = 1e-4


def filter_response(x: Tensor, eps: Tensor | float = 1e-6) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps)``, the mean over the positions of each channel of each sample.

    Args:
        x: Activations, ``(N, C, ...)``.
        eps: Added to the mean square.

    Returns:
        The normalized activations, in the dtype of ``x``.

    Examples:
        >>> filter_response(torch.tensor([[[3.0, 4.0]]]), 0.0)
        tensor([[[0.8485, 1.1314]]])
    """
    wide = x.to(statistics_dtype(x.dtype))
    square = wide.square()
    if x.ndim > 2:
        square = square.mean(list(range(2, x.ndim)), keepdim=True)
    return (wide * (square + eps).rsqrt()).to(x.dtype)


class FilterResponseNorm(Successor, nn.Module):
    """Filter Response Normalization (arXiv 1911.09737): ``y = weight x / sqrt(mean(x^2) + eps) + bias`` per sample and channel.

    Train and eval mode are the same. Use [`normkit.FilterResponseNorm1d`][], ``2d`` or ``3d``, followed by a
    ``ThresholdedLinearUnit``: the mean is not removed, and a threshold at zero would not fit it.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, ...)``.
        eps: Added to the mean square.
        affine: Learn ``weight`` and ``bias``.
        learn_eps: Add the size of a learned number to ``eps``, for inputs of one position. Default: for 1d layers.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    statistics = "instance"
    centers = False
    carries = ()
    learns_eps = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        learn_eps: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        learned = self.learns_eps if learn_eps is None else learn_eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None
        self.epsilon = nn.Parameter(torch.full((), FIRST_EPSILON, device=device, dtype=dtype)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, ...)``.

        Raises:
            ValueError: The shape is wrong.
        """
        if x.ndim not in self.dimensions or x.shape[1] != self.num_features:
            expected = " or ".join(f"{d}-d" for d in self.dimensions)
            raise ValueError(
                f"{type(self).__name__} expects {expected} input with {self.num_features} channels, got shape {tuple(x.shape)}"
            )
        y = filter_response(x, self.eps if self.epsilon is None else self.eps + self.epsilon.abs())
        shape = (-1,) + (1,) * (x.ndim - 2)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, learn_eps={self.epsilon is not None}"


class FilterResponseNorm1d(FilterResponseNorm):
    """Filter Response Normalization (arXiv 1911.09737) of ``(N, C)`` or ``(N, C, L)``; see ``FilterResponseNorm``."""

    dimensions = (2, 3)
    learns_eps = True


class FilterResponseNorm2d(FilterResponseNorm):
    """Filter Response Normalization (arXiv 1911.09737) of ``(N, C, H, W)``; see ``FilterResponseNorm``."""

    dimensions = (4,)


class FilterResponseNorm3d(FilterResponseNorm):
    """Filter Response Normalization (arXiv 1911.09737) of ``(N, C, D, H, W)``; see ``FilterResponseNorm``."""

    dimensions = (5,)


class ThresholdedLinearUnit(Leaf, nn.Module):
    """``max(x, threshold)`` with a learned threshold per channel (arXiv 1911.09737); at threshold 0 it is the ReLU.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, ...)``.
        device: Device of the threshold.
        dtype: Its dtype.
    """

    def __init__(
        self, num_features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger of ``x`` and its channel's threshold."""
        return torch.maximum(x, self.threshold.to(x.dtype).view(-1, *(1 for _ in x.shape[2:])))

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(len(self.threshold))


def threshold_relus(model: nn.Module, batches: object = None) -> nn.Module:
    """Make every ReLU behind a Filter Response Normalization a :class:`ThresholdedLinearUnit`, in place.

    Behind it means: the ReLU takes its output, or a sum that it is part of. The functions stay the same, as thresholds start
    at 0. A ReLU that is called at several places, or is no module, stays and is named in the log. ``normkit.revert`` makes
    them ReLUs again.

    Args:
        model: A model with such layers.
        batches: Not used.

    Returns:
        The model.
    """
    flow, modules = dataflow(model), dict(model.named_modules())
    kept: list[str] = []
    for index, step in enumerate(flow.steps):
        path = step.path if step.name == "module" else None
        relu = modules.get(path or "") if path is not None else None
        if type(relu) is not nn.ReLU and step.name != "relu":
            continue
        norm = _norm_before(flow, modules, index)
        if norm is None:
            continue
        if relu is None or len(flow.calls(path or "")) > 1:
            kept.append(f"{path or 'a function'} behind {norm}")
            continue
        layer = modules[norm]
        own = list(layer.parameters())
        like = next((p for p in (*own, *model.parameters()) if p.is_floating_point()), torch.empty(0))
        trained = not own or any(p.requires_grad for p in own)
        relu.__class__ = ThresholdedLinearUnit  # pyright: ignore[reportAttributeAccessIssue]
        threshold = torch.zeros(vars(layer)["num_features"], device=like.device, dtype=like.dtype)
        relu.register_parameter("threshold", nn.Parameter(threshold, trained))
        vars(relu)["normkit_undo"] = _make_relu
    if kept:
        _logger.warning(
            "filter-response: %d ReLUs keep their threshold of 0, as they are functions or called at several places: %s; make "
            "each an nn.ReLU of its own",
            len(kept),
            ", ".join(dict.fromkeys(kept[:5])),
        )
    return model


def _norm_before(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> str | None:
    """Path of the Filter Response Normalization whose output, or a sum of it, step ``index`` takes."""
    for source in flow.steps[index].inputs:
        step = flow.steps[source]
        if step.name == "module" and isinstance(modules.get(step.path or ""), FilterResponseNorm):
            return step.path
        passes = step.name == "add" or (step.name == "module" and type(modules[step.path or ""]) is nn.Identity)
        found = _norm_before(flow, modules, source) if passes else None
        if found is not None:
            return found
    return None


def _make_relu(unit: nn.Module) -> None:
    del unit._parameters["threshold"]
    unit.__class__ = nn.ReLU


METHOD = Method(
    recipes=(
        Recipe(
            "filter-response",
            "Filter response normalization, learned thresholds",
            "Singh, Krishnan 2019, arXiv 1911.09737",
            0.1,
            convert=Part("filter-response", "eps", "learn_eps"),
            prepare=Part(threshold_relus),
            group="Baselines",
        ),
    ),
    targets={
        "filter-response": layer_target(
            (FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d),
            "the mean is not removed; running statistics are set aside until revert and not saved",
            another=True,
        )
    },
)
