"""Batch normalization with frozen statistics and trained scale and shift: the usual choice when fine-tuning detectors.

Faster R-CNN and its successors fine-tune a pretrained backbone on one or two images per device, where statistics of a batch
are useless (Ren, He, Girshick, Sun, arXiv 1506.01497; He, Zhang, Ren, Sun, arXiv 1512.03385, appendix on detection). The
running statistics of the pretraining become constants:

    y = gamma (x - running_mean) / sqrt(running_var + eps) + beta     in training and in evaluation
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.inspection.norms import has_initial_statistics
from normkit.methods.method import Method, Part, Recipe, Successor, layer_target

_logger = logging.getLogger("normkit")


class FrozenBatchNorm(Successor, _BatchNorm):
    """Batch normalization with its running statistics in train mode, too; they never change.

    Arguments and state-dict keys are those of ``torch.nn.BatchNorm2d``. Scale and shift are trained.
    """

    statistics = "running"
    carries = ("eps", "momentum")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, ...)`` with the running statistics."""
        self._check_input_dim(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenBatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """Batch normalization (arXiv 1502.03167) of ``(N, C)`` or ``(N, C, L)`` with frozen statistics."""


class FrozenBatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """Batch normalization (arXiv 1502.03167) of ``(N, C, H, W)`` with frozen statistics."""


class FrozenBatchNorm3d(FrozenBatchNorm, nn.BatchNorm3d):
    """Batch normalization (arXiv 1502.03167) of ``(N, C, D, H, W)`` with frozen statistics."""


@torch.no_grad()
def warn_if_untrained(model: nn.Module) -> None:
    """Log a warning that names the frozen layers whose statistics are still (0, 1): they normalize nothing."""
    untrained = [
        path or "the model"
        for path, layer in model.named_modules()
        if isinstance(layer, FrozenBatchNorm) and has_initial_statistics(layer)
    ]
    if untrained:
        shown = ", ".join(untrained[:5]) + (f" and {len(untrained) - 5} more" if len(untrained) > 5 else "")
        _logger.warning(
            "frozen: %d layers normalize with mean 0 and variance 1, as they have seen no data: %s; load trained weights "
            "before freezing, or normkit.recalibrate(model, batches) after it",
            len(untrained),
            shown,
        )


def start_frozen(model: nn.Module, batches: object) -> nn.Module:
    """The converted model; see :func:`warn_if_untrained`."""
    warn_if_untrained(model)
    return model


METHOD = Method(
    recipes=(
        Recipe(
            "frozen",
            "BatchNorm, statistics fixed, scale and shift trained",
            "Ren et al. 2015, arXiv 1506.01497",
            0.1,
            convert=Part("frozen"),
            prepare=Part(start_frozen),
            group="Batch normalization and its relatives",
        ),
    ),
    targets={
        "frozen": layer_target(
            (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d), "statistics are never updated"
        )
    },
)
