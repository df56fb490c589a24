"""Your own model and data for ``normkit compare``: a factory for each.

normkit compare --data docs/examples/own.py:data --model docs/examples/own.py:model --methods none,batch,bnp
"""

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def data() -> tuple[Dataset, Dataset | None, Dataset]:
    """Called without arguments; returns (train, validation, test).

    Each is a Dataset of (input, class number), or a pair of tensors. Validation may be None: then a stratified fifth of the
    training split is used.
    """
    generator = torch.Generator().manual_seed(0)

    def waves(count: int) -> Dataset:
        labels = torch.arange(count) % 3
        time = torch.linspace(0, 1, 64)
        phase = torch.rand(count, 1, generator=generator) * 6.28
        signal = torch.sin(6.28 * (labels[:, None] + 2) * time + phase)
        noise = 0.5 * torch.randn(count, 64, generator=generator)
        return TensorDataset((signal + noise)[:, None], labels)

    return waves(600), None, waves(300)


def model(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Called with the shape of one input and the number of classes; maps ``(N, *input_shape)`` to ``(N, classes)``.

    Build it with the normalization layers it has anyway; each method replaces them as it needs.
    """
    channels = input_shape[0]
    return nn.Sequential(
        nn.Conv1d(channels, 16, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 32, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
