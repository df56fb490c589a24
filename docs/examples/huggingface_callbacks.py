"""BNP and the Monitor in Hugging Face's Trainer: two callbacks, model and arguments as they were."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import normkit
from normkit.integrations.huggingface import BNPCallback, MonitorCallback
from normkit.study.data.load import load_data


class Digits(Dataset):
    """Digits as the model's keyword arguments."""

    def __init__(self, limit: int) -> None:
        data = load_data("digits", limit=limit)
        self.inputs, self.labels = data.normalise(data.train.inputs), data.train.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.inputs[index], "labels": self.labels[index]}


def main(steps: int = 20) -> tuple[Trainer, MonitorCallback]:
    """Train a few steps; returns the Trainer and the Monitor's callback."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = normkit.convert(ResNetForImageClassification(config), "none")
    monitor = MonitorCallback(every=10)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=0.01,
            optim="sgd",
            max_grad_norm=5.0,  # clips the preconditioned gradient
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Digits(640), callbacks=[BNPCallback(), monitor])
        trainer.train()
    return trainer, monitor


if __name__ == "__main__":
    trainer, monitor = main()
    print(trainer.state.log_history[-1])
    print(f"stability {monitor.monitor.history[-1]['curvature']['stability']:.2f}")
