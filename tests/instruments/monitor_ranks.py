"""What each rank does in the Monitor's test; a module of its own, which spawned processes can import."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from normkit.instruments import Monitor
from tests.gloo import one_of


def sums(model, batch):
    """Without batch statistics two ranks see exactly what one process sees."""
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


@one_of(2)
def watch(rank, folder):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = ddp_batch()
    batch = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
    with Monitor(model, sums, optimizer, every=1, path=Path(folder) / f"{rank}.jsonl") as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss = sums(model, batch)
            loss.backward()
            monitor.observe(batch, loss)
            optimizer.step()


def ddp_batch():
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(8, 3, **options), torch.randn(8, 2, **options)
