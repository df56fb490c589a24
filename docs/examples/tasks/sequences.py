"""A sequence model: 1-D convolutions on sequences of different lengths, with a padding mask.

normkit compare --task docs/examples/tasks/sequences.py:task --methods batch,layer,bnp --batch-sizes 16,4 --budget 800
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import normkit

Batch = dict[str, Tensor]


class Waves(Dataset[tuple[Tensor, int]]):
    """Noisy waves of 20 to 60 steps, of one of three frequencies."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed + index)
        length = int(torch.randint(20, 61, (), generator=generator))
        phase, noise = 6.3 * torch.rand(1, generator=generator), torch.randn(length, generator=generator)
        return torch.sin(0.3 * (1 + index % 3) * torch.arange(length) + phase) + 0.7 * noise, index % 3


class Sequences(nn.Module):
    """Two convolutions and the mean over the steps that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 16, 7, padding=3, bias=False), nn.BatchNorm1d(16)
        self.second, self.head = nn.Conv1d(16, 16, 7, padding=3), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(N, 3)`` of sequences ``(N, T)``; the mask is 1 where they are no padding."""
        inner = self.norm(self.first(x[:, None])).relu() * mask[:, None]
        last = self.second(inner).relu() * mask[:, None]
        return self.head(last.sum(2) / mask.sum(1, keepdim=True))


def collate(samples: list[tuple[Tensor, int]]) -> Batch:
    """Pad to the longest, with the mask of what is no padding."""
    waves = [wave for wave, _ in samples]
    masks = [torch.ones(len(wave)) for wave in waves]
    labels = torch.tensor([label for _, label in samples])
    return {"x": pad_sequence(waves, True), "mask": pad_sequence(masks, True), "label": labels}


def inputs(batch: Batch) -> Batch:
    """Keyword arguments of the model."""
    return {"x": batch["x"], "mask": batch["mask"]}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(model(**inputs(batch)), batch["label"])


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Fraction of sequences whose frequency is recognized."""
    right = [model(**inputs(batch)).argmax(1) == batch["label"] for batch in batches]
    return float(torch.cat(right).float().mean())


task = normkit.Task(
    "waves",
    model=Sequences,
    train=Waves(300, 0),
    test=Waves(150, 10_000),
    loss=loss,
    score=accuracy,
    metric="recognized",
    unit="%",
    collate=collate,
    inputs=inputs,
)
