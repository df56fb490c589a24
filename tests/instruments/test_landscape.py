"""The walk along the gradient against closed forms and against the definition done by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from normkit.instruments import landscape
from tests.cases import batch_loss


class Point(nn.Module):
    """Weights alone; the objective is a function of them."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def quadratic(model, eigenvalues):
    return (torch.tensor(eigenvalues, dtype=torch.float64) * model.w.square()).sum() / 2


def test_quadratic_has_the_closed_form():
    eigenvalues, w = [1.0, 4.0], [2.0, 1.0]
    found = landscape(Point(w), quadratic, eigenvalues, lr=0.1, steps=5, span=(0.5, 2))
    g = [e * x for e, x in zip(eigenvalues, w, strict=True)]
    change = math.hypot(*(e * x for e, x in zip(eigenvalues, g, strict=True)))  # |A g| per unit of eta
    assert found.gradient_norm == pytest.approx(math.hypot(*g), rel=1e-12)
    assert found.step_sizes == pytest.approx([0.1 * 0.5 * 4 ** (k / 4) for k in range(5)], rel=1e-12)
    for eta, loss, moved in zip(found.step_sizes, found.losses, found.gradient_changes, strict=True):
        expected = sum(e * (x - eta * d) ** 2 for e, x, d in zip(eigenvalues, w, g, strict=True)) / 2
        assert loss == pytest.approx(expected, rel=1e-12)
        assert moved == pytest.approx(eta * change, rel=1e-12)
    assert found.beta == pytest.approx(change / math.hypot(*g), rel=1e-12)
    assert found.loss_band == (min(found.losses), max(found.losses))


def test_beta_names_the_step_size_where_the_landscape_is_roughest():
    def kink(model, where):  # a wall of curvature 100 begins at w = where
        return model.w.square().sum() / 2 + 50 * (where - model.w).clamp(min=0).square().sum()

    found = landscape(Point([1.0]), kink, 0.5, lr=0.5, steps=2, span=(0.2, 2))
    assert found.step_sizes == pytest.approx((0.1, 1.0))
    assert found.beta == pytest.approx(51, rel=1e-9)
    assert found.beta_step_size == pytest.approx(1.0)


def test_batch_normalized_net_equals_the_definition_done_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    found = landscape(net, batch_loss, batch, lr=0.3, steps=3, span=(0.5, 2))
    g = torch.autograd.grad(batch_loss(net, batch), list(net.parameters()))
    size = sum(x.square().sum() for x in g).sqrt()
    for k, eta in enumerate((0.15, 0.3, 0.6)):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), g, strict=True):
                p -= eta * d
        loss = batch_loss(moved, batch)
        there = torch.autograd.grad(loss, list(moved.parameters()))
        change = sum((a - b).square().sum() for a, b in zip(there, g, strict=True)).sqrt()
        assert found.losses[k] == pytest.approx(loss.item(), rel=1e-10)
        assert found.gradient_changes[k] == pytest.approx(change.item(), rel=1e-10)
        assert found.slopes[k] == pytest.approx((change / (eta * size)).item(), rel=1e-10)


def test_dropout_draws_the_same_mask_at_every_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1, bias=False)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    found = landscape(net, lambda m, b: m(b).square().mean(), x, lr=1e-7, steps=3)
    assert all(change < 1e-3 * found.gradient_norm for change in found.gradient_changes)


class Moody(nn.Module):
    """Its loss depends on how often it was run."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.register_buffer("runs", torch.zeros((), dtype=torch.float64))

    def forward(self):
        self.runs += 1
        return self.runs * self.w.sum()


def test_every_step_starts_from_the_same_buffers():
    found = landscape(Moody(), lambda model, _: model(), None, lr=1e-9, steps=4)
    assert found.losses == pytest.approx([found.loss] * 4, rel=1e-6)
    assert found.gradient_changes == (0.0,) * 4


def test_divergence_along_the_way_shows_in_the_band_and_not_in_the_json():
    found = landscape(Point([1.0]), lambda m, _: m.w.sum() * (1 / (m.w > 0).double()).sum(), None, lr=1.0, steps=2)
    assert math.isinf(found.loss_band[1]) or math.isnan(found.loss_band[1])
    assert None in found.to_dict()["losses"]


def test_autocast_sees_the_moved_weights():
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    x = torch.randn(32, 4)
    inside = torch.autocast("cpu", dtype=torch.bfloat16)
    with inside:
        net(x)  # fills the cache of casts
        found = landscape(net, lambda m, b: m(b).float().square().mean(), x, lr=0.5, steps=2)
    outside = landscape(net, lambda m, b: m(b).square().mean(), x, lr=0.5, steps=2)
    assert found.losses == pytest.approx(outside.losses, rel=0.05)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 1.0, "steps": 0}, {"lr": 1.0, "span": (2.0, 1.0)}])
def test_step_sizes_must_be_positive(bad):
    with pytest.raises(ValueError, match="needs lr > 0"):
        landscape(Point([1.0]), quadratic, [1.0], **bad)


def test_the_objective_must_return_a_scalar():
    with pytest.raises(ValueError, match="scalar tensor"):
        landscape(nn.Linear(1, 1), lambda m, x: m(x), torch.ones(3, 1), lr=0.1)
