"""Batchless normalization: mean and standard deviation are parameters, fitted by the likelihood of a Gaussian.

Berger, Uc Cetina. "Batchless Normalization: How to Normalize Activations Across Instances with Minimal Memory
Requirements", arXiv 2212.14729.

Per channel, ``n = (x - mu) / sigma`` and ``y = gamma n + beta``. The task loss trains x, gamma and beta and takes mu,
sigma for constants; the negative log likelihood ``log sigma + n^2 / 2`` trains mu and sigma and takes x for a constant.
That likelihood depends on the layer's input alone, so its gradient need not travel through the backward pass: the layer
counts the moments of its input, and [`normkit.attach`][] turns them into the gradient of mu and sigma right before
the optimizer's step. Nothing in it depends on how the rows were split into micro-batches or over ranks.

What is kept is mu and sigma^2 - eps, under the names of batch normalization's running statistics: state dicts load both
ways, and evaluate the same.
"""

import functools
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from normkit.inspection.compiling import disable_dynamo
from normkit.inspection.counting import Collector, RowCounter, is_counting
from normkit.methods.batchless.functions import Gradient, affine_map, moments_about
from normkit.methods.batchless.one_pass import one_pass
from normkit.methods.method import Successor, WideStatistics
from normkit.moments import Moments, empty, merge, observe_unchecked, statistics_dtype

Scale = Literal["log", "abs", "inv"]


class InFront(Protocol):
    """What counts rows of a batchless layer together with those of the layer in front of it."""

    def has_observed(self, x: Tensor) -> bool:
        """Return whether the rows of the input ``x`` were observed there; then they are counted there, too."""
        ...


ATTACH = "call normkit.attach(model, optimizer) after building the optimizer"


class BatchlessNorm(WideStatistics, Successor, nn.Module):
    """Normalization by a learned Gaussian per channel (arXiv 2212.14729), ``y = (x - mu) / sigma * gamma + beta``.

    The same affine map in train and in eval mode; mu and sigma are fitted by the likelihood ``log sigma + n^2 / 2``. Use
    [`normkit.BatchlessNorm1d`][], ``2d`` or ``3d``. The layer starts like batch normalization at mean 0 and variance 1;
    [`normkit.initialize`][] sets both from data. It learns only while [`normkit.attach`][] connects it with an
    optimizer.

    Attributes:
        weight: gamma, or None.
        bias: beta, or None.
        running_mean: mu. Not touched by autograd (``requires_grad=False``), in fp32 or wider.
        running_var: ``sigma^2 - eps``; like ``running_mean``.
    """

    statistics = "learned"
    dimensions = ()
    in_front: InFront | None = None

    def __init__(
        self,
        num_features: int,
        *,
        affine: bool = True,
        shared: bool = False,
        scale: Scale = "log",
        gradient: Gradient = "natural",
        projected: bool = False,
        eps: float = 1e-5,
        feature_dim: Literal[1, -1] = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layer.

        Args:
            num_features: Number of channels.
            affine: Whether gamma and beta are learned; without them the layer keeps no activation for the backward
                pass.
            shared: Whether all channels share one mu and one sigma, fitted to the rows of all of them.
            scale: What the ``plain`` gradient trains for sigma: its logarithm, itself up to its sign (``abs``), or its inverse
                up to the sign (``inv``).
            gradient: ``natural`` or ``plain`` gradient of the likelihood, see [`normkit.functional.gaussian_nll_gradients`][].
            projected: Whether [`normkit.attach`][] projects the weight gradient of the layer that feeds this one, see
                [`normkit.functional.projected_weight_gradient`][].
            eps: Added to the variance that sigma is fitted to, like the eps of batch normalization.
            feature_dim: Dimension of the channels: 1, or -1 for channels-last inputs such as tokens.
            device: Device of the parameters.
            dtype: Dtype of gamma and beta; mean and variance are in fp32 or wider.

        Raises:
            ValueError: ``scale``, ``gradient`` or ``feature_dim`` is none of the choices.
        """
        super().__init__()
        if scale not in ("log", "abs", "inv"):
            raise ValueError(f"scale={scale!r}: choose 'log', 'abs' or 'inv'")
        if gradient not in ("natural", "plain"):
            raise ValueError(f"gradient={gradient!r}: choose 'natural' or 'plain'")
        if feature_dim not in (1, -1):
            raise ValueError(f"feature_dim={feature_dim!r}: choose 1 (channels first) or -1 (channels last)")
        self.num_features, self.eps, self.feature_dim, self.projected = num_features, eps, feature_dim, projected
        self.shared = shared
        self.scale: Scale = scale
        self.gradient: Gradient = gradient
        dtype = dtype or torch.get_default_dtype()
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        wide = statistics_dtype(dtype)
        self.running_mean = nn.Parameter(torch.zeros(num_features, device=device, dtype=wide), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(num_features, device=device, dtype=wide), requires_grad=False)
        self._variance_ratio: Tensor | float | None = None  # E n^2 of the last step
        self.counter: RowCounter[tuple[Moments, int]] = RowCounter(self._no_collector())  # of moments and instances
        self.register_load_state_dict_pre_hook(_without_count)

    @property
    def affine(self) -> bool:
        """Whether the layer has gamma and beta."""
        return self.weight is not None

    @property
    def sigma(self) -> Tensor:
        """Standard deviation per channel, shape ``(num_features,)``."""
        return (self.running_var.detach() + self.eps).sqrt()

    @property
    def mismatch(self) -> Tensor | None:
        """``(E n^2 - 1) / 2`` of the last step, mean over the channels; None before the first step.

        It is the likelihood relative to a perfect fit, which has 0.
        """
        ratio = vars(self).get("_variance_ratio")
        return None if ratio is None else (torch.as_tensor(ratio, dtype=self.running_mean.dtype) - 1) / 2

    def note_variance_ratio(self, ratio: Tensor | float) -> None:
        """Take note of E n^2 of a step."""
        vars(self)["_variance_ratio"] = ratio  # torch's __setattr__ takes longer than the fit of a small layer

    @classmethod
    def from_batchnorm(cls, norm: nn.Module, *args: Any, **settings: Any) -> Any:
        """As :meth:`normkit.methods.method.Successor.from_batchnorm`; channels that share statistics take those of all."""
        layer = super().from_batchnorm(norm, *args, **settings)
        layer.set_statistics(layer.running_mean, layer.running_var)
        return layer

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Set mu to ``mean`` and sigma to ``sqrt(variance + eps)``; shared ones to those of all channels together."""
        if self.shared:
            mean, variance = mean.mean(), variance.mean() + mean.var(correction=0)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    @torch.no_grad()
    def regauge(self, mean: Tensor, variance: Tensor) -> None:
        """Set mu and sigma, and change gamma and beta so that the layer computes the same function.

        ``beta += gamma (mu' - mu) / sigma``, then ``gamma *= sigma' / sigma``.

        Args:
            mean: The new mu, ``(num_features,)``.
            variance: The new ``sigma^2 - eps``, ``(num_features,)``.

        Raises:
            ValueError: The layer has no gamma and beta.
        """
        if self.weight is None or self.bias is None:
            raise ValueError(
                f"{self}: without gamma and beta no other mu and sigma compute the same; use set_statistics"
            )
        before, sigma = self.running_mean.clone(), self.sigma
        self.set_statistics(mean, variance)
        self.bias.copy_(self.bias + self.weight * (self.running_mean - before) / sigma)
        self.weight.copy_(self.weight * (self.sigma / sigma))

    def adopt_statistics(self, moments: Moments) -> None:
        """Take the mean and the variance of the rows."""
        self.set_statistics(moments.mean, moments.variance)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``.

        Args:
            x: Input with ``num_features`` channels in dimension ``feature_dim``.
            mask: Boolean, broadcastable to ``x`` without its channels; rows where it is False (padding) are normalized
                but not counted.

        Returns:
            ``(x - mu) / sigma * gamma + beta``, shape and dtype of ``x``.

        Raises:
            ValueError: ``x`` has the wrong number of dimensions or channels.
        """
        tokens = self.feature_dim == -1 and x.dim() > 1
        if not (tokens or x.dim() in self.dimensions) or x.shape[self.feature_dim] != self.num_features:
            raise ValueError(
                f"{self}: input {'x'.join(map(str, x.shape))} does not fit; expected "
                f"{' or '.join(map(str, self.dimensions))} dimensions with {self.num_features} channels in dimension "
                f"{self.feature_dim} (channels-last inputs need feature_dim=-1)"
            )
        last = tokens and x.dim() > 2
        rows = x.reshape(-1, self.num_features) if last else x
        learns = self.training and torch.is_grad_enabled()
        own: dict[str, Any] = self._parameters  # attributes of modules are found slowly
        mean, variance = own["running_mean"], own["running_var"]
        if mean.requires_grad or variance.requires_grad:  # in a model whose parameters were all unfrozen
            mean, variance = mean.detach(), variance.detach()  # constants to the task loss
        arguments = rows, mean, variance, own["weight"], own["bias"], self.eps
        counts = learns and is_counting()
        y, moments = (one_pass(*arguments) if counts and mask is None else None) or (affine_map(*arguments), None)
        y = y.view_as(x) if last else y
        if counts:
            if mask is not None or moments is None:
                self._observe(x, rows, y, mask, mean, variance)
            else:
                self.counter.count(y, (moments, len(y)), own["weight"])
        return y

    @disable_dynamo
    def _observe(self, x: Tensor, rows: Tensor, y: Tensor, mask: Tensor | None, mean: Tensor, variance: Tensor) -> None:
        if mask is not None:
            moments = observe_unchecked(x, self.feature_dim, mask)
        elif self.in_front is not None and self.in_front.has_observed(x):
            return
        else:
            moments = moments_about(rows, mean, variance, self.eps)
        self.counter.count(y, (moments, len(y)), self._parameters["weight"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "in_front"}  # its copy connects itself

    def _no_collector(self) -> Collector:
        return Collector(type(self).__name__, ATTACH, collects=False)

    @property
    def is_collected(self) -> bool:
        """Whether an optimizer fits mu and sigma to the rows that this layer counts (a layer copied alone has none)."""
        return self.counter.collector.collects

    def set_collector(self, collector: Collector | None) -> None:
        """Restart counting, for ``collector`` or for none."""
        self.counter = RowCounter(collector or self._no_collector())

    def take(self) -> tuple[Moments, int]:
        """Return the moments of the rows since the last call, possibly none, and the number of samples."""
        counted = self.counter.take()
        if len(counted) == 1 and not self.shared:
            return counted[0]
        if counted:
            rows = functools.reduce(merge, [moments for moments, _ in counted])
        else:
            like = self.running_mean
            rows = empty(self.num_features, dtype=like.dtype, device=like.device)
        if self.shared:
            rows = _of_all_channels(rows)
        return rows, sum(instances for _, instances in counted)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults."""
        given = {
            "affine": (self.affine, True),
            "shared": (self.shared, False),
            "scale": (self.scale, "log"),
            "gradient": (self.gradient, "natural"),
            "projected": (self.projected, False),
            "feature_dim": (self.feature_dim, 1),
        }
        return ", ".join([f"{self.num_features}", *(f"{k}={v!r}" for k, (v, default) in given.items() if v != default)])


def _of_all_channels(rows: Moments) -> Moments:
    """The moments of all channels' rows together, given to each channel as if they were its own."""
    mean = rows.mean.mean()
    m2 = rows.m2.mean() + rows.count * rows.mean.var(correction=0)
    return Moments(rows.count, mean.expand_as(rows.mean), m2.expand_as(rows.m2))


def _without_count(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Let a batchless layer load a batch normalization's state (which takes ours for one from before it counted)."""
    state.pop(prefix + "num_batches_tracked", None)


class BatchlessNorm1d(BatchlessNorm):
    """Batchless normalization (arXiv 2212.14729) of ``(N, C)`` or ``(N, C, L)``, ``(N, L, C)`` with ``feature_dim=-1``.

    See ``BatchlessNorm``.

    Examples:
        >>> BatchlessNorm1d(2, affine=False, eps=0.0)(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]
    """

    dimensions = (2, 3)


class BatchlessNorm2d(BatchlessNorm):
    """Batchless normalization (arXiv 2212.14729) of ``(N, C, H, W)``; see ``BatchlessNorm``."""

    dimensions = (4,)


class BatchlessNorm3d(BatchlessNorm):
    """Batchless normalization (arXiv 2212.14729) of ``(N, C, D, H, W)``; see ``BatchlessNorm``."""

    dimensions = (5,)


def batchless_layers(model: nn.Module) -> list[BatchlessNorm]:
    """Return all batchless layers of ``model``, each once."""
    return [module for module in model.modules() if isinstance(module, BatchlessNorm)]
