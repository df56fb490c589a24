"""BNP on two ranks is BNP on one process that sees all data."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from normkit import BNP
from tests.gloo import one_of

pytestmark = pytest.mark.slow  # two processes
STEPS, RANKS = 3, 2


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
        x += torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(-1, 1, 1, 1)  # the ranks' data differ
        yield x, torch.randint(3, (8,), generator=generator)


def run(network, forward, bnp, data):
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    bnp.attach(optimizer)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
    return {"parameters": network.state_dict(), "statistics": bnp.state_dict()}


@one_of(RANKS)
def rank(index, file, results):
    collectives = []
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        collectives.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    network = model()
    bnp = BNP(network)
    share = ((x.chunk(RANKS)[index], y.chunk(RANKS)[index]) for x, y in batches())
    result = run(network, DistributedDataParallel(network), bnp, share)
    torch.save({**result, "collectives": collectives}, os.path.join(results, f"{index}.pt"))


def test_two_ranks_train_as_one_process_with_one_all_reduce_per_step(tmp_path):
    torch.multiprocessing.spawn(rank, args=(tmp_path / "store", str(tmp_path)), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{index}.pt") for index in range(RANKS)]
    network = model()
    alone = run(network, network, BNP(network), batches())
    for other in ranks:
        assert len(other["collectives"]) == STEPS
        for name, value in alone["parameters"].items():
            assert torch.allclose(other["parameters"][name], value, rtol=1e-12, atol=1e-13)
        for path, entry in alone["statistics"].items():
            for name, value in entry.items():
                assert torch.allclose(other["statistics"][path][name], value, rtol=1e-12)
                assert torch.equal(other["statistics"][path][name], ranks[0]["statistics"][path][name])
