"""What every room tests on: small models, layer shapes, layouts and dtypes, one line each.

A new model is one line of MODELS, and every recipe is tested on it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import normkit


class Residual(nn.Module):
    """Adds its input, or a projection of it, to what ``branch`` makes of it."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.branch(x))


def head(features: int, classes: int = 3, dims: int = 2) -> list[nn.Module]:
    """Pooling and a classifier."""
    pool = [getattr(nn, f"AdaptiveAvgPool{dims}d")(1), nn.Flatten()] if dims else []
    return [*pool, nn.Linear(features, classes)]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), *head(8, dims=0))


def _sequences() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Tanh(), *head(4, dims=1))


def _images() -> nn.Module:
    first = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    second = nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*first, *second, *head(6))


def _transposed() -> nn.Module:
    layers = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), *head(4))


def _volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 2, bias=False), nn.BatchNorm3d(4), nn.ReLU(), *head(4, dims=3))


def _residual() -> nn.Module:
    first = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    branch = nn.Sequential(*(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
    ))
    branch.append(nn.BatchNorm2d(4))
    return nn.Sequential(*first, Residual(branch), *head(4))


def batches(
    shape: tuple[int, ...], count: int = 1, size: int = 8, *, seed: int = 1, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Return batches of normal inputs of this shape with labels of three classes."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *shape, generator=draw, dtype=dtype), torch.randint(3, (size,), generator=draw))
        for _ in range(count)
    ]


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of a batch: the objective of instruments and training."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Case(NamedTuple):
    """A model with batch normalization for three classes, and the shape of one example."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """Return the model with the weights of a seed."""
        torch.manual_seed(seed)
        return self.build().to(dtype)

    def batches(self, count: int = 1, size: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
        """Return ``count`` batches, always the same ones."""
        return [(1 + x, y) for x, y in batches(self.shape, count, size, dtype=dtype)]


MODELS = {
    "mlp": Case(_mlp, (6,)),
    "sequences": Case(_sequences, (2, 9)),
    "images": Case(_images, (2, 8, 8)),
    "transposed": Case(_transposed, (2, 6, 6)),
    "volumes": Case(_volumes, (2, 4, 4, 4)),
    "residual": Case(_residual, (2, 6, 6)),
}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = [  # of what a normalization of three channels takes, by its dimensions
    (1, (7, 3)),
    (1, (4, 3, 5)),
    (2, (4, 3, 5, 2)),
    (2, (1, 3, 4, 2)),
    (3, (2, 3, 2, 3, 2)),
]


def norm_cases(family: str) -> list[tuple[type[nn.Module], type[nn.Module], tuple[int, ...]]]:
    """Return (layer class, BatchNorm of its dimensions, input shape) of a family of layers, as ``"BatchlessNorm"``."""
    return [(getattr(normkit, f"{family}{d}d"), getattr(nn, f"BatchNorm{d}d"), shape) for d, shape in SHAPES]


def rows(x: Tensor, channel_dim: int = 1) -> Tensor:
    """Return what statistics are taken over: ``(rows, channels)``."""
    return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])
