"""Covariate shift against its definition, done by hand with copies of the network."""

import copy

import pytest
import torch
from torch import nn

from normkit.instruments import covariate_shift, snapshot
from tests.cases import batch_loss


def trained_one_step(optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ).double()  # fmt: skip
    batch = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    step = optimizer(net.parameters(), lr=0.1)
    batch_loss(net, batch).backward()
    old, before = copy.deepcopy(net), snapshot(net)
    step.step()
    return net, old, before, batch


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_equals_the_definition_by_hand(optimizer):
    net, old, before, batch = trained_one_step(optimizer)
    found = covariate_shift(net, batch_loss, batch, before)
    assert [shift.layer for shift in found.layers] == ["0", "3", "6"]
    for shift, index in zip(found.layers, (0, 3, 6), strict=True):
        mixed = copy.deepcopy(old)
        for earlier in range(index):
            mixed[earlier] = copy.deepcopy(net[earlier])
        g = torch.autograd.grad(batch_loss(old, batch), list(old[index].parameters()))
        after = torch.autograd.grad(batch_loss(mixed, batch), list(mixed[index].parameters()))
        g, after = (torch.cat([t.flatten() for t in parts]) for parts in (g, after))
        assert shift.difference == pytest.approx((g - after).norm().item(), rel=1e-9, abs=1e-15)
        assert shift.cosine == pytest.approx(nn.functional.cosine_similarity(g, after, dim=0).item(), rel=1e-9)
        assert shift.relative == pytest.approx(((g - after).norm() / g.norm()).item(), rel=1e-9, abs=1e-14)


def test_the_first_layer_has_no_shift_and_a_step_of_zero_gives_none():
    net, old, _, batch = trained_one_step()
    assert covariate_shift(net, batch_loss, batch, snapshot(old)).layers[0].difference == 0
    still = covariate_shift(net, batch_loss, batch, snapshot(net))
    assert [shift.difference for shift in still.layers] == [0.0, 0.0, 0.0]
    assert [shift.cosine for shift in still.layers] == pytest.approx([1.0, 1.0, 1.0], rel=1e-12)


def test_layers_are_ordered_as_they_run_not_as_they_are_declared():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x).tanh())

    torch.manual_seed(0)
    net, before = Backwards(), snapshot(Backwards())
    batch = torch.randn(4, 3), torch.randint(2, (4,))
    found = covariate_shift(net, batch_loss, batch, before)
    assert [shift.layer for shift in found.layers] == ["first", "last"]
    assert found.layers[0].difference == 0
    assert found.layers[1].difference > 0


def test_chosen_layers_and_bad_arguments():
    net, _, before, batch = trained_one_step()
    whole = covariate_shift(net, batch_loss, batch, before)
    part = covariate_shift(net, batch_loss, batch, before, layers=["6"])
    assert part.layers == (whole.layers[2],)
    with pytest.raises(ValueError, match="nowhere"):
        covariate_shift(net, batch_loss, batch, before, layers=["nowhere"])
    with pytest.raises(ValueError, match="snapshot"):
        covariate_shift(net, batch_loss, batch, {"w": torch.zeros(1)})
