"""BNP and the Monitor in Lightning: two callbacks, the module and the Trainer as they were."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from normkit.integrations.lightning import BNPCallback, MonitorCallback
from normkit.study.data.load import load_data


class Classifier(pl.LightningModule):
    """A small network for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss."""
        inputs, labels = batch
        return cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def objective(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss, for the Monitor."""
    return cross_entropy(module.network(batch[0]), batch[1])


def main(epochs: int = 3) -> tuple[float, MonitorCallback]:
    """Train; returns test accuracy and the Monitor's callback."""
    pl.seed_everything(0, verbose=False)
    data = load_data("digits")
    train = TensorDataset(data.normalise(data.train.inputs), data.train.labels)
    module, monitor = Classifier(), MonitorCallback(objective, every=20)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[BNPCallback(), monitor],
        gradient_clip_val=5.0,  # clips the preconditioned gradient
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    with torch.no_grad():
        predicted = module.network(data.normalise(data.test.inputs)).argmax(1)
    return (predicted == data.test.labels).float().mean().item(), monitor


if __name__ == "__main__":
    accuracy, monitor = main()
    print(f"test accuracy {accuracy:.3f}; stability {monitor.monitor.history[-1]['curvature']['stability']:.2f}")
