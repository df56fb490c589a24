"""CIFAR-10 as the studies with a loop of their own use it: splits decoded once, images as networks get them, accuracy."""

from pathlib import Path

import torch
from torch import Tensor, nn

from normkit.study.data.load import load_data

RUNS = Path("runs")
Splits = dict[str, tuple[Tensor, Tensor]]


def cifar10(path: str) -> Splits:
    """uint8 images and labels, decoded once; ``train`` 45,000, ``validation`` 5,000, ``test`` 10,000."""
    file = RUNS / "cifar10.pt"
    if not file.exists():
        data = load_data(path)
        train, validation = data.split_validation(5_000)
        splits = {"train": train, "validation": validation, "test": data.test}
        file.parent.mkdir(exist_ok=True)
        torch.save({name: (split.inputs, split.labels) for name, split in splits.items()}, file)
    return torch.load(file)


def prepared(images: Tensor) -> Tensor:
    """Images as a network gets them: about mean 0 and variance 1, channels last."""
    return images.float().sub_(120.7).div_(64.1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In per cent."""
    guesses = torch.cat([model(prepared(part)).argmax(1) for part in images.split(100)])
    return 100 * (guesses == labels).float().mean().item()
