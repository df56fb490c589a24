"""Normalization by l_p means, for p = 1, 2 and infinity.

How does batch normalization help optimization? Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas, Aleksander Madry,
NeurIPS 2018, arXiv 1805.11604. The paper uses these layers to show that the smoothing of the landscape does not need
the control of mean and variance: they smooth like batch normalization while their activations shift more.
"""

import math

import torch
from torch import Tensor, nn

from normkit.inspection.norms import Statistics
from normkit.methods.method import Method, Part, Recipe, Successor, layer_target
from normkit.moments import Moments, observe, statistics_dtype


def lp_statistics(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    r"""Return mean and l_p mean ``N_p = (mean |x|^p)^(1/p)`` of the *uncentred* values of every channel.

    ``N_1`` is the mean magnitude, ``N_2`` the root mean square, ``N_inf`` the largest magnitude.

    Args:
        x: Activations, channels first: ``(N, C, ...)``.
        p: 1, 2 or ``math.inf``.

    Returns:
        Mean and ``N_p``, each ``(C,)``, in fp32 or wider.

    Examples:
        >>> x = torch.tensor([[3.0], [-4.0]])
        >>> [round(lp_statistics(x, p)[1].item(), 4) for p in (1, 2, math.inf)]
        [3.5, 3.5355, 4.0]
    """
    dims = [d for d in range(x.ndim) if d != 1]
    dtype = statistics_dtype(x.dtype)
    rows = x.numel() // x.shape[1]
    # vector_norm has a zero gradient at zero, where a square root would have an infinite one
    norm = torch.linalg.vector_norm(x, ord=p, dim=dims, dtype=dtype)
    return x.mean(dim=dims, dtype=dtype), norm / rows ** (1 / p)


class LpNorm(Successor, nn.Module):
    r"""``y = (x - mean) / (N_p + eps) * weight + bias`` per channel, with ``N_p`` of the uncentred batch.

    See ``lp_statistics``. Evaluation uses running averages of the mean and of ``N_p``, as batch normalization does.
    The latter is kept as the variance with which batch normalization divides by the same, ``running_var = (N_p +
    eps)^2 - eps``, so that state dicts load both ways and evaluate the same.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, ...)``.
        p: 1, 2 or ``math.inf``.
        eps: Added to ``N_p``.
        momentum: Weight of the newest batch in the running averages; None averages all batches equally.
        affine: Learn ``weight`` and ``bias``.
        track_running_stats: Keep running averages; without them evaluation uses the batch too.
        device: Device of parameters and buffers.
        dtype: Their dtype.

    Raises:
        ValueError: ``p`` is something else.
    """

    statistics = "batch"
    carries = ("eps", "momentum", "track_running_stats")
    dimensions = ()
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        p: float = 2,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if p not in (1, 2, math.inf):
            raise ValueError(f"p is {p}; l_p normalization is there for 1, 2 and math.inf")
        self.num_features, self.p, self.eps, self.momentum = num_features, p, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats

        def full(value: float) -> Tensor:
            return torch.full((num_features,), value, device=device, dtype=dtype)

        self.weight = nn.Parameter(full(1.0)) if affine else None
        self.bias = nn.Parameter(full(0.0)) if affine else None
        self.register_buffer("running_mean", full(0.0) if track_running_stats else None)
        self.register_buffer("running_var", full(1.0) if track_running_stats else None)
        counter = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)

    @property
    def running_scale(self) -> Tensor | None:
        """Running average of ``N_p``, ``(C,)``."""
        return None if self.running_var is None else (self.running_var + self.eps).sqrt() - self.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, ...)``.

        Raises:
            ValueError: The shape is another, or there is one value per channel in train mode.
        """
        if x.ndim not in self.dimensions:
            expected = " or ".join(f"{d}-d" for d in self.dimensions)
            raise ValueError(f"{type(self).__name__} expects {expected} input, got shape {tuple(x.shape)}")
        if not x.numel():  # it has no statistics
            return self._normalize(x, x.new_zeros(self.num_features), x.new_ones(self.num_features))
        running_mean, running_scale = self.running_mean, self.running_scale
        if self.training or running_mean is None or running_scale is None:
            if self.training and x.numel() == x.shape[1]:
                raise ValueError(
                    f"{type(self).__name__} saw one value per channel in train mode (input {tuple(x.shape)}): "
                    "minus its mean it is 0; use a larger batch, or eval()"
                )
            mean, scale = lp_statistics(x, self.p)
            if self.training:
                self._track(mean, scale)
        else:
            mean, scale = running_mean, running_scale
        return self._normalize(x, mean, scale)

    def _normalize(self, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        gain = 1 / (scale + self.eps)
        if self.weight is not None:
            gain = gain * self.weight
        y = (x - mean.view(shape)) * gain.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, scale: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.running_scale is None:
            return
        weight: float | Tensor | None = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if weight is None:
                weight = 1 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight if weight is not None else 1.0)
        running = self.running_scale.lerp(scale.to(self.running_var.dtype), weight if weight is not None else 1.0)
        self.running_var.copy_((running + self.eps).square() - self.eps)

    def batch_statistics(self, x: Tensor) -> tuple[Statistics, Tensor]:
        """The mean and ``(N_p + eps)^2`` of ``x``, and the share of eps in the divisor."""
        mean, scale = lp_statistics(x.detach(), self.p)
        return Statistics(mean, (scale + self.eps).square()), self.eps / (scale + self.eps)

    def normalize_by_batch(self, x: Tensor) -> Tensor:
        """The output in train mode; running statistics stay."""
        return self._normalize(x, *lp_statistics(x, self.p))

    def observe_input(self, x: Tensor, mask: Tensor | None = None) -> Moments:
        """``(mean, N_p)`` of one batch as the mean of its rows: merged, ``N_p`` is averaged over batches as in training."""
        rows = observe(x, 1, mask)
        scale = lp_statistics(x.detach(), self.p)[1].to(rows.mean.dtype)
        both = torch.cat([rows.mean, torch.where(rows.count > 0, scale, 0)])
        return Moments(rows.count, both, torch.zeros_like(both))

    def adopt_statistics(self, moments: Moments) -> None:
        """Take the averages of the mean and of ``N_p``."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, scale = moments.mean.chunk(2)
        self.running_mean.copy_(mean)
        self.running_var.copy_((scale + self.eps).square() - self.eps)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_features}, p={self.p}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"


class LpNorm1d(LpNorm):
    """l_p normalization (arXiv 1805.11604) of ``(N, C)`` or ``(N, C, L)``; see ``LpNorm``."""

    dimensions = (2, 3)


class LpNorm2d(LpNorm):
    """l_p normalization (arXiv 1805.11604) of ``(N, C, H, W)``; see ``LpNorm``."""

    dimensions = (4,)


class LpNorm3d(LpNorm):
    """l_p normalization (arXiv 1805.11604) of ``(N, C, D, H, W)``; see ``LpNorm``."""

    dimensions = (5,)


_MEANS = {
    "l1": (1, "the mean magnitude"),
    "l2": (2, "the root mean square"),
    "linf": (math.inf, "the largest magnitude"),
}

METHOD = Method(
    recipes=tuple(
        Recipe(
            name,
            f"BatchNorm that divides by {mean}",
            "Santurkar et al. 2018, arXiv 1805.11604",
            0.1,
            convert=Part(name, "momentum"),
            group="Batch normalization and its relatives",
            ablation=True,
        )
        for name, (_, mean) in _MEANS.items()
    ),
    targets={name: layer_target((LpNorm1d, LpNorm2d, LpNorm3d), fixed={"p": p}) for name, (p, _) in _MEANS.items()},
)
