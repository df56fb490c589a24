"""Data of the doctor's tests, and what each rank does in one of them; spawned processes can import this."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit
from tests.cases import batch_loss
from tests.gloo import one_of


def batches(count, size, seed):
    """Noisy images of three brightnesses: easy to learn, never exactly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        y = torch.randint(3, (size,), generator=generator)
        x = torch.randn(size, 1, 6, 6, generator=generator) + 0.5 * y[:, None, None, None]
        drawn.append((x, y))
    return drawn


@one_of(2)
def examine(rank, folder):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    found = normkit.doctor(DistributedDataParallel(net), batch_loss, batches(4, 8, seed=rank))
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found.to_dict()))
