"""What the tests of other people's stacks share: a small network, its data, and the loop written out."""

import torch
from torch import Tensor, nn


def network() -> nn.Module:
    """Return a small network with batch normalization, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return batches of inputs and labels of three classes, always the same ones."""
    draw = torch.Generator().manual_seed(1)
    return [
        (2 * torch.randn(size, 6, generator=draw) + 1, torch.randint(3, (size,), generator=draw)) for _ in range(count)
    ]


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    """Train without any framework."""
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Compare all tensors bit for bit."""
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
