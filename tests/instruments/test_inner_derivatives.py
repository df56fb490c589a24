"""Objectives and models that differentiate inside: physics-informed losses, forces, gradient penalties."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import normkit
from normkit import instruments


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()


def penalty(model, batch):
    x = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().mean()


class Forces(nn.Module):
    """Returns the negative derivative of an energy by its input."""

    def __init__(self):
        super().__init__()
        self.energy = network()

    def forward(self, x):
        x = x.clone().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


DATA = [torch.randn(16, 5, generator=torch.Generator().manual_seed(s)).double() for s in range(4)]
INSTRUMENTS = {
    "activations": lambda m: instruments.activations(m, penalty, DATA[0]),
    "channels": lambda m: instruments.channels(m, penalty, DATA[0]),
    "conditioning": lambda m: instruments.conditioning(m, penalty, DATA),
    "covariate_shift": lambda m: instruments.covariate_shift(m, penalty, DATA[0], instruments.snapshot(m)),
    "curvature": lambda m: instruments.curvature(m, penalty, DATA[0], lr=0.1),
    "discrepancy": lambda m: instruments.discrepancy(m, penalty, DATA[0]),
    "doctor": lambda m: normkit.doctor(m, penalty, DATA, optimizer=SGD(m.parameters(), lr=0.1)),
    "landscape": lambda m: instruments.landscape(m, penalty, DATA[0], lr=0.1, steps=2),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", INSTRUMENTS)
def test_every_instrument_measures_a_loss_that_differentiates_inside(name, grad):
    model = network()
    before = [t.clone() for t in model.state_dict().values()]
    with torch.set_grad_enabled(grad):
        assert INSTRUMENTS[name](model) is not None
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("to", ["batch", "batchless"])
def test_a_model_of_forces_is_recalibrated_like_its_energy(to):
    model, alone = Forces(), network()
    for net in (model, alone):
        net.load_state_dict(net.state_dict())
    normkit.convert(model, to)
    normkit.convert(alone, to)
    normkit.recalibrate(model, DATA)
    normkit.recalibrate(alone, DATA)
    torch.testing.assert_close(model.energy.state_dict(), alone.state_dict())


def test_a_model_of_forces_is_initialized_and_folded():
    model = normkit.convert(Forces(), "batchless")
    normkit.initialize(model, DATA)
    mean = model.energy[0](torch.cat(DATA)).mean(0)
    torch.testing.assert_close(model.energy[1].running_mean.data, mean.detach())
    assert all(p.requires_grad for p in (model.energy[0].weight, model.energy[3].bias))
    model.eval()
    alone = normkit.fold(model.energy, example=DATA[0])
    assert type(alone[1]) is nn.Identity
