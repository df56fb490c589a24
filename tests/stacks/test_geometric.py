"""PyTorch Geometric: linear layers and normalizations of its own."""

import pytest
import torch
from torch import nn

import normkit

pytest.importorskip("torch_geometric", reason="needs torch_geometric, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::torch_geometric")]

from torch_geometric.nn import GCN  # noqa: E402

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]])


def network():
    torch.manual_seed(0)
    return GCN(5, 8, num_layers=3, out_channels=2, norm="batch_norm")


def train(model, optimizer, steps=3):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, EDGES).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["batchless", "group", "revisited"])
def test_its_batch_normalizations_are_found(name):
    model, optimizer = normkit.apply(name, network(), lr=0.05)
    train(model, optimizer)
    assert len(normkit.describe(model, optimizer)) == 2
    assert all(not effect.left for effect in normkit.describe(model, optimizer).effects)


class Mixed(nn.Module):
    """A linear layer of torch behind those of the library."""

    def __init__(self):
        super().__init__()
        self.body, self.head = network(), nn.Linear(2, 2)

    def forward(self, x, edges):
        return self.head(self.body(x, edges))


def test_bnp_names_the_linear_layers_that_it_leaves_alone():
    with pytest.raises(ValueError, match=r"convs\.0\.lin: Linear is a linear layer but no torch\.nn\.Linear"):
        normkit.apply("bnp", network(), lr=0.05)
    with pytest.warns(UserWarning, match=r"bnp does little here: 1 of \d+ modules with weights preconditioned"):
        model, optimizer = normkit.apply("bnp", Mixed(), lr=0.05)
    train(model, optimizer)
    (preconditioned,) = (e for e in normkit.describe(model, optimizer).effects if e.verb == "preconditioned")
    assert preconditioned.done == ("head",)
    assert {f"body.convs.{i}.lin" for i in range(3)} <= set(preconditioned.left)
