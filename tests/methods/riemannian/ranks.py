"""What two ranks do in test_distributed.py: train with half of the batch each, compare with one process."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from normkit import SGDG, AdamG, param_groups, scale_invariance
from tests.gloo import one_of

RULES = {"sgdg": SGDG, "adamg": AdamG}
STEPS = 4


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3), nn.InstanceNorm2d(5, track_running_stats=True), nn.ReLU()),
        *(nn.Conv2d(5, 1, 3, bias=False), nn.InstanceNorm2d(1), nn.Flatten(), nn.Linear(16, 2)),
    ).double()


REPORT = scale_invariance(build())


def optimizer_for(model, rule, **options):
    return RULES[rule](param_groups(model, lr=0.01, manifold_lr=0.1, rule=REPORT), **options)


def train(model, optimizer, steps, rank=0, world=1):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        loss = nn.functional.cross_entropy(model(x[rank::world]), (torch.arange(8) % 3 % 2)[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@one_of(2)
def compare(rank, store):
    for rule, options in (("sgdg", {}), ("adamg", {})):
        alone = build()
        optimizer = optimizer_for(alone, rule, **options)
        expected_variance = alone[1].running_var.clone()
        train(alone, optimizer, range(STEPS))
        for wrap in (DistributedDataParallel, sharded):
            model = build()
            wrapped = wrap(model)
            optimizer = optimizer_for(model, rule, **options)
            assert torch.allclose(model[1].running_var, expected_variance, rtol=1e-12)
            train(wrapped, optimizer, range(STEPS // 2), rank, 2)
            resumed = optimizer_for(model, rule, **options)
            resumed.load_state_dict(optimizer.state_dict())
            train(wrapped, resumed, range(STEPS // 2, STEPS), rank, 2)
            for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                assert torch.allclose(whole(mine), theirs, rtol=0, atol=1e-10), (rule, wrap.__name__, rank)
            for p in next(g["params"] for g in resumed.param_groups if g["manifold"]):
                for name, value in resumed.state[p].items():
                    assert name == "step" or (type(value), len(whole(value))) == (type(p.detach()), len(p))
