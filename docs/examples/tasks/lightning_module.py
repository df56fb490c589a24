"""A Lightning module with its DataModule as a task; its own optimizer is not used.

normkit compare --task docs/examples/tasks/lightning_module.py:task --methods batch,group,bnp --batch-sizes 16,4
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from normkit.integrations import lightning


class Digits(LightningModule):
    """A small convolutional network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss."""
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy."""
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Used by a Trainer; a study compares methods with their own."""
        return torch.optim.Adam(self.parameters())


class Images(LightningDataModule):
    """The digits that ship with scikit-learn."""

    def setup(self, stage: str) -> None:
        """Cut the splits."""
        images, labels = load_digits(return_X_y=True)
        inputs = torch.as_tensor(images).float().reshape(-1, 1, 8, 8) / 8 - 1
        self.data = TensorDataset(inputs, torch.as_tensor(labels).long())

    def _loader(self, start: int, stop: int) -> DataLoader:
        return DataLoader(Subset(self.data, range(start, stop)), batch_size=32)

    def train_dataloader(self) -> DataLoader:
        """The first 1,000."""
        return self._loader(0, 1000)

    def val_dataloader(self) -> DataLoader:
        """The next 300."""
        return self._loader(1000, 1300)

    def test_dataloader(self) -> DataLoader:
        """The rest."""
        return self._loader(1300, 1797)


def task() -> object:
    """The task."""
    return lightning.task(Digits, Images(), monitor="val_acc", unit="%")
