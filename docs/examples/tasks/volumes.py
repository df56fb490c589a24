"""Segmentation of 3-D volumes as a task: Dice, one volume per step.

normkit compare --task docs/examples/tasks/volumes.py:task --methods batch,instance,bnp --batch-sizes 1 --budget 200
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import Dataset

import normkit

SIDE = 16


class Volumes(Dataset[tuple[Tensor, Tensor]]):
    """Noisy volumes whose brightness and contrast differ, and the masks of their ellipsoids; each made from its own seed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + index)
        place, size, light = (torch.rand(n, 1, 1, 1, generator=generator) for n in (3, 3, 2))
        grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
        mask = (((grid - 0.8 * place + 0.4) / (0.4 + 0.4 * size)).square().sum(0, keepdim=True) < 1).float()
        noise = torch.randn(mask.shape, generator=generator)
        return light[:1] - 0.5 + (0.7 + 0.7 * light[1:]) * (mask + 0.5 * noise), mask


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with its normalization."""
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU())


class UNet(nn.Module):
    """A U-Net with one skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.pool, self.inner = block(1, 8), nn.MaxPool3d(2), block(8, 16)
        self.up, self.joined, self.head = nn.ConvTranspose3d(16, 8, 2, stride=2), block(16, 8), nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 1, D, H, W)`` of volumes of the same shape."""
        skip = self.outer(x)
        return self.head(self.joined(torch.cat([skip, self.up(self.inner(self.pool(skip)))], 1)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy and soft Dice of each volume, averaged."""
    volumes, masks = batch
    logits = model(volumes)
    found = logits.sigmoid()
    both = (found * masks).flatten(1).sum(1)
    overlap = (2 * both + 1) / ((found + masks).flatten(1).sum(1) + 1)
    return binary_cross_entropy_with_logits(logits, masks) + 1 - overlap.mean()


def dice(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean overlap of prediction and mask, ``2 |A and B| / (|A| + |B|)``."""
    overlaps = []
    for volumes, masks in batches:
        found = (model(volumes) > 0).float()
        both = (found * masks).flatten(1).sum(1)
        overlaps.append(2 * both / (found + masks).flatten(1).sum(1).clamp(min=1))
    return float(torch.cat(overlaps).mean())


task = normkit.Task(
    "volumes", model=UNet, train=Volumes(60, 0), test=Volumes(30, 10_000), loss=loss, score=dice, metric="Dice"
)
