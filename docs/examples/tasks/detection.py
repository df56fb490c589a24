"""A detection-like task: images of different sizes, a list as batch, two losses, and no loss in eval mode.

normkit compare --task docs/examples/tasks/detection.py:task --methods batch,group,bnp --batch-sizes 4,1 --budget 400
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torch.utils.data import Dataset

import normkit

Sample = tuple[Tensor, dict[str, Tensor]]


class Scenes(Dataset[Sample]):
    """A bright square or disc on noise; images are 12 to 20 pixels high and wide."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self.seed + index)
        height, width = torch.randint(12, 21, (2,), generator=generator).tolist()
        center = 0.3 + 0.4 * torch.rand(2, generator=generator)
        label = torch.randint(2, (), generator=generator)
        down = torch.linspace(0, 1, height)[:, None] - center[0]
        across = torch.linspace(0, 1, width)[None] - center[1]
        distance = torch.maximum(down.abs(), across.abs()) if label else (down.square() + across.square()).sqrt()
        image = 2.0 * (distance < 0.25) + 0.5 * torch.randn(height, width, generator=generator)
        return image[None], {"center": center, "label": label}


class Detector(nn.Module):
    """In train mode a dictionary of losses, in eval mode a prediction for each image, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 8), (8, 16)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.label, self.center = nn.Linear(256, 2), nn.Linear(256, 2)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses if there are targets and the model trains, else predictions."""
        height, width = (max(image.shape[k] for image in images) for k in (1, 2))
        padded = [nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
        sizes = torch.tensor([[i.shape[1] / height, i.shape[2] / width] for i in images], device=images[0].device)
        features = self.features(torch.stack(padded))
        logits, centers = self.label(features), self.center(features).sigmoid() / sizes
        if not self.training or targets is None:
            return [{"label": x.argmax(), "center": c} for x, c in zip(logits, centers, strict=True)]
        return {
            "label": cross_entropy(logits, torch.stack([target["label"] for target in targets])),
            "center": smooth_l1_loss(centers, torch.stack([target["center"] for target in targets])),
        }


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of different sizes stay a list."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def loss(model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
    """The sum of both losses, each a mean over the images."""
    losses = model(*batch)
    return losses["label"] + 10 * losses["center"]


def found(model: nn.Module, batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]]) -> float:
    """Fraction of the images with the right label and a center within a tenth of the image."""
    hits = []
    for images, targets in batches:
        for guess, target in zip(model(images), targets, strict=True):
            near = (guess["center"] - target["center"]).norm() < 0.1
            hits.append(bool(near & (guess["label"] == target["label"])))
    return sum(hits) / len(hits)


task = normkit.Task(
    "scenes",
    model=Detector,
    train=Scenes(200, 0),
    test=Scenes(100, 10_000),
    loss=loss,
    score=found,
    metric="found",
    unit="%",
    collate=collate,
)
