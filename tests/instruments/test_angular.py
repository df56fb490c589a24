"""Angles and the gradient that normalization removes: closed forms and theorems."""

import math

import pytest
import torch
from torch import nn

from normkit.instruments import angular, gradient_removed, snapshot


def net_with_norm():
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()


def test_angle_and_effective_learning_rate_in_closed_form():
    net = net_with_norm()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    before = snapshot(net)
    with torch.no_grad():
        net[0].weight.copy_(
            torch.tensor([[2.0, 2.0 * math.tan(0.01)], [-2.0 * math.tan(0.01), 2.0]], dtype=torch.float64)
        )
    (found,) = angular(net, optimizer, before).layers
    assert found.layer == "0"
    assert found.angle == pytest.approx(0.01, rel=1e-9)
    assert found.weight_norm == pytest.approx(2 / math.cos(0.01), rel=1e-9)
    assert found.effective_lr == pytest.approx(0.1 / found.weight_norm**2, rel=1e-9)
    assert found.equilibrium == pytest.approx(math.sqrt(2 * 0.1 * 5e-4 / 1.9), rel=1e-12)


def test_a_tiny_angle_is_not_lost():
    net = net_with_norm()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    before = snapshot(net)
    with torch.no_grad():
        net[0].weight += 1e-10 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    (found,) = angular(net, torch.optim.SGD(net.parameters(), lr=0.1), before).layers
    assert found.angle == pytest.approx(1e-10, rel=1e-6)
    assert found.equilibrium is None


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), 4000),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9), 4000),
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), 4000),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_random_walks_on_scale_invariant_weights_reach_the_equilibrium(build, steps):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(500, 4, bias=False), nn.BatchNorm1d(4))
    weight = net[0].weight
    optimizer = build([weight])
    angles = []
    for step in range(steps):
        w = weight.detach()
        noise = torch.randn_like(w)
        noise -= (noise * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w  # scale invariance
        weight.grad = noise / w.norm(dim=1, keepdim=True)
        last = steps - 200 <= step
        before = snapshot(net) if last else {}
        optimizer.step()
        if last:
            angles.append(angular(net, optimizer, before).layers[0])
    mean = sum(found.angle for found in angles) / len(angles)
    assert mean == pytest.approx(angles[-1].equilibrium, rel=0.1)


def test_layers_without_a_normalization_behind_them_are_left_out():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    assert angular(net, torch.optim.SGD(net.parameters(), lr=0.1), snapshot(net)).layers == ()


@pytest.mark.parametrize("affine", [True, False])
def test_removed_share_satisfies_theorem_4_1(affine):
    torch.manual_seed(0)
    first = nn.Linear(5, 16, bias=False)  # its weight, 16 rows of 5, is what the normalization sees
    net = nn.Sequential(first, nn.BatchNorm1d(5, eps=1e-30, affine=affine), nn.ReLU(inplace=True)).double()
    if affine:
        nn.init.uniform_(net[1].weight, 0.5, 2)
        nn.init.uniform_(net[1].bias, -0.5, 0.5)
    target = torch.randn(16, 5, dtype=torch.float64)
    found = gradient_removed(net, lambda m, _: (m[1:](m[0].weight) * target).sum(), None)
    x = first.weight
    gamma = net[1].weight if affine else torch.ones(5, dtype=torch.float64)
    beta = net[1].bias if affine else torch.zeros(5, dtype=torch.float64)
    z = nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-30)
    g = torch.where(z > 0, target, 0.0)
    (dx,) = torch.autograd.grad((net[1:](x) * target).sum(), x)
    factor = (gamma / x.std(0, correction=0)).square()
    share = 1 - dx.square().sum(0) / (factor * g.square().sum(0))
    torch.testing.assert_close(torch.tensor(found.channels["1"], dtype=torch.float64), share, rtol=1e-9, atol=1e-12)
    whole = (share * g.square().sum(0)).sum() / g.square().sum()
    assert found.layers["1"] == pytest.approx(whole.item(), rel=1e-9)


def test_removed_share_is_that_of_the_affine_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    kept = []
    handle = net[1].register_forward_hook(lambda _, __, out: out.register_hook(kept.append) and None)
    (net(x).square().mean()).backward()
    handle.remove()
    m = 6 * 2 * 2
    expected = (net[1].bias.grad ** 2 + net[1].weight.grad ** 2) / (m * kept[0].square().sum((0, 2, 3)))
    found = gradient_removed(net, lambda model, b: model(b).square().mean(), x)
    torch.testing.assert_close(torch.tensor(found.channels["1"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)


def test_layers_in_eval_mode_remove_nothing_and_are_left_out():
    net = net_with_norm().eval()
    found = gradient_removed(net, lambda m, x: m(x).mean(), torch.randn(4, 2, dtype=torch.float64))
    assert found.layers == {}
