"""Batch Renormalization: training and evaluation use the same running statistics, up to a bounded correction.

Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models. Sergey Ioffe, 2017,
arXiv 1702.03275.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.methods.method import Method, Part, Recipe, Successor, layer_target
from normkit.moments import statistics_dtype


class Correction(NamedTuple):
    """The correction from statistics of the batch to running statistics, per channel.

    Attributes:
        r: Ratio of the standard deviations, clipped.
        d: Distance of the means in running standard deviations, clipped.
        mean: Mean of the batch.
        std: Standard deviation of the batch, ``sqrt(variance + eps)``.
    """

    r: Tensor
    d: Tensor
    mean: Tensor
    std: Tensor


def renorm_correction(
    x: Tensor,
    running_mean: Tensor,
    running_std: Tensor,
    r_max: Tensor | float,
    d_max: Tensor | float,
    eps: float = 1e-5,
) -> Correction:
    r"""Return the correction that makes normalizing by the batch agree with normalizing by the running statistics.

    ``r = clip(std_B / std, 1/r_max, r_max)`` and ``d = clip((mean_B - mean) / std, -d_max, d_max)``, without
    gradient. Where neither is clipped, ``(x - mean_B) / std_B * r + d = (x - mean) / std``.

    Args:
        x: Activations, channels first: ``(N, C, ...)``.
        running_mean: Running mean, ``(C,)``.
        running_std: Running standard deviation, ``(C,)``.
        r_max: Bound of ``r``, at least 1.
        d_max: Bound of ``d``, at least 0.
        eps: Added to the variance of the batch.

    Returns:
        The correction, in fp32 or wider.

    Examples:
        >>> x = torch.tensor([[1.0], [5.0]])
        >>> c = renorm_correction(x, torch.tensor([2.0]), torch.tensor([4.0]), r_max=3.0, d_max=5.0, eps=0.0)
        >>> c.r.item(), c.d.item()
        (0.5, 0.25)
    """
    x = x.detach()
    var, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), [i for i in range(x.ndim) if i != 1], correction=0)
    std = (var + eps).sqrt()
    bound = torch.as_tensor(r_max, dtype=std.dtype, device=std.device)
    reach = torch.as_tensor(d_max, dtype=std.dtype, device=std.device)
    r = torch.clamp(std / running_std, 1 / bound, bound)
    d = torch.clamp((mean - running_mean) / running_std, -reach, reach)
    return Correction(r, d, mean, std)


class _BatchRenorm(Successor, _BatchNorm):
    """``y = ((x - mean_B) / std_B * r + d) * weight + bias`` in train mode; see [`normkit.functional.renorm_correction`][].

    Evaluation, state-dict keys and the meaning of all tensors are those of batch normalization. The bounds start at
    ``r_max = 1, d_max = 0``, which is batch normalization, and grow linearly to their final values; the position in
    that schedule is the buffer ``num_batches_tracked``, so it survives a checkpoint. The running averages are plain
    averages of all batches until there are ``1 / momentum`` of them: from then on their weight is ``momentum``.

    Args:
        num_features: Channels ``C``.
        eps: Added to the variance of a batch.
        momentum: Weight of the newest batch in the running averages (the paper's 0.01: they take part in training).
        affine: Learn ``weight`` and ``bias``.
        r_max: Final bound of ``r``.
        d_max: Final bound of ``d``.
        warmup: Steps of plain batch normalization.
        r_steps: Step from which on ``r_max`` holds.
        d_steps: Step from which on ``d_max`` holds.
        device: Device of parameters and buffers.
        dtype: Their dtype.

    Raises:
        ValueError: A bound or a step is out of range.
    """

    statistics = "batch"
    keeps_scale = "batch renormalization divides by running statistics in part, and these follow a scale slowly"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5000,
        r_steps: int = 40000,
        d_steps: int = 25000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        if r_max < 1 or d_max < 0:
            raise ValueError(f"r_max is {r_max} and d_max {d_max}; they must be at least 1 and 0 (batch normalization)")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum}; the running averages take part in training: choose it in (0, 1]")
        if not 0 <= warmup <= min(r_steps, d_steps):
            raise ValueError(f"warmup is {warmup}; it must lie between 0 and r_steps={r_steps}, d_steps={d_steps}")
        self.r_max, self.d_max = r_max, d_max
        self.warmup, self.r_steps, self.d_steps = warmup, r_steps, d_steps

    def bounds(self) -> tuple[Tensor, Tensor]:
        """``r_max`` and ``d_max`` at the current step."""
        mean, _, steps = self._running()
        past = (steps - self.warmup).to(mean.dtype)
        r = 1 + (self.r_max - 1) * (past / max(1, self.r_steps - self.warmup)).clamp(0, 1)
        return r, self.d_max * (past / max(1, self.d_steps - self.warmup)).clamp(0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, ...)``.

        Raises:
            ValueError: The shape is wrong, or there is one value per channel in train mode.
        """
        self._check_input_dim(input)
        if not (self.training and input.numel()):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        if input.numel() == input.shape[1]:
            raise ValueError(
                f"{type(self).__name__} saw one value per channel in train mode (input {tuple(input.shape)}): their "
                "deviation is 0, no gradient passes; use a larger batch or map, or a method without statistics"
            )
        running_mean, running_var, _ = self._running()
        running_std = (running_var + self.eps).sqrt()
        correction = renorm_correction(input, running_mean, running_std, *self.bounds(), self.eps)
        gain, shift = correction.r.to(running_mean.dtype), correction.d.to(running_mean.dtype)
        if self.weight is not None:
            gain, shift = gain * self.weight, shift * self.weight
        if self.bias is not None:
            shift = shift + self.bias
        self._track(correction, running_std)
        return F.batch_norm(input, None, None, gain, shift, True, 0, self.eps)

    def _running(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        return self.running_mean, self.running_var, self.num_batches_tracked

    @torch.no_grad()
    def _track(self, batch: Correction, running_std: Tensor) -> None:
        running_mean, running_var, steps = self._running()
        steps.add_(1)
        weight = (1 / steps.to(running_std.dtype)).clamp(min=self.momentum or 0)  # torch's update_bn sets it to None
        # a batch that is not finite must not poison what takes part in training from here on
        usable = batch.std.isfinite()
        mean = torch.where(usable, batch.mean, running_mean).to(running_mean.dtype)
        std = torch.where(usable, batch.std, running_std).to(running_std.dtype)
        std = running_std.lerp(std, weight)  # the paper averages deviations, not variances
        running_mean.lerp_(mean, weight)
        running_var.copy_((std.square() - self.eps).clamp(min=0))

    def extra_repr(self) -> str:
        """The settings."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}"


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    """Batch Renormalization (arXiv 1702.03275) of ``(N, C)`` or ``(N, C, L)``; see [`normkit.functional.renorm_correction`][]."""


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    """Batch Renormalization (arXiv 1702.03275) of ``(N, C, H, W)``; see [`normkit.functional.renorm_correction`][]."""


class BatchRenorm3d(_BatchRenorm, nn.BatchNorm3d):
    """Batch Renormalization (arXiv 1702.03275) of ``(N, C, D, H, W)``; see [`normkit.functional.renorm_correction`][]."""


_OPTIONS = ("momentum", "r_max", "d_max", "warmup", "r_steps", "d_steps")

METHOD = Method(
    recipes=(
        Recipe(
            "batch-renorm",
            "BatchNorm corrected towards its running statistics",
            "Ioffe 2017, arXiv 1702.03275",
            0.1,
            # a fiftieth of the paper's schedule
            convert=Part("batch-renorm", *_OPTIONS, warmup=100, r_steps=800, d_steps=500),
            group="Batch normalization and its relatives",
        ),
    ),
    targets={"batch-renorm": layer_target((BatchRenorm1d, BatchRenorm2d, BatchRenorm3d))},
)
