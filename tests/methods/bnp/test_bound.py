"""BNP with a bound on its steps, and its recipes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normkit
from normkit import BNP
from normkit.functional import bounding_factors, precondition
from normkit.optim import weight_rows
from normkit.optim.weight_rows import Layout
from tests.methods.bnp.models import mlp, same, train, twin


def test_a_bound_that_is_never_reached_changes_nothing(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    bounded, stepping, _ = twin(model, max_change=1e6)
    train(bounded, data, stepping.step, stepping)
    assert same(plain, bounded, 1e-12)


@pytest.mark.parametrize("by_hand", [False, True])
def test_with_a_bound_no_learning_rate_diverges(setting, by_hand):
    model, data = setting
    worst = {}
    for limit in (None, 0.1):
        trained = copy.deepcopy(model)
        optimizer = SGD(trained.parameters(), lr=30.0, momentum=0.9)
        bnp = BNP(trained, max_change=limit)
        bnp.attach(optimizer)

        def step(bnp=bnp, optimizer=optimizer):
            if by_hand:
                bnp.precondition_()
            optimizer.step()

        train(trained, data * 4, step, optimizer)
        worst[limit] = max(F.cross_entropy(trained(x), y).item() for x, y in data)
    assert worst[None] > 100
    assert worst[0.1] < 5


def test_the_bound_is_on_what_momentum_makes_of_a_lasting_gradient():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    grads = []
    for lr, momentum in ((50.0, 0.0), (5.0, 0.9)):  # lr / (1 - momentum) is the same
        torch.manual_seed(0)
        model = mlp()
        optimizer = SGD(model.parameters(), lr=lr, momentum=momentum)
        bnp = BNP(model, max_change=0.1)
        bnp.attach(optimizer)
        model(x).square().sum().backward()
        bnp.precondition_()
        grads.append(model[0].weight.grad)
    assert torch.allclose(*grads, rtol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("largest", "stacked"), [(1 << 22, 1 << 14), (60, 1 << 14), (1 << 22, 0)])
def test_layers_stepped_together_are_each_stepped_as_if_alone(monkeypatch, largest, stacked, memory_format):
    monkeypatch.setattr(weight_rows, "LARGEST_BATCH", largest)
    monkeypatch.setitem(weight_rows._JOINED, "cpu", stacked)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(3)),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        *(nn.ConvTranspose2d(4, 4, (2, 1), groups=2) for _ in range(2)),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(144, 3),
        *(nn.Linear(3, 3) for _ in range(3)),
    ).double()
    model.to(memory_format=memory_format)
    model[-1].bias.requires_grad_(False)
    limit = 0.05
    optimizer = SGD([{"params": model[:5].parameters(), "lr": 3.0}, {"params": model[5:].parameters(), "lr": 5.0}])
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    bnp = BNP(model, max_change=limit)
    bnp.attach(optimizer)
    for last_but_one in (True, False):
        model[-2].requires_grad_(last_but_one)  # in the second step one layer is missing
        optimizer.zero_grad()
        x, y = 1 + torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,))
        F.cross_entropy(model(x), y).backward()
        raw = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        bnp.precondition_()
        bounded = 0
        for seen, metric in bnp.metrics():
            layer, shape = seen.layer, seen.geometry
            if layer.weight not in raw:
                continue
            weight_grad, bias_grad = raw[layer.weight], raw.get(layer.bias)
            options = {"groups": shape.groups, "transposed": shape.transposed, "mean_removed": seen.mean_removed}
            weight, bias = precondition(weight_grad, bias_grad, *metric[:2], divisor=metric.divisor, **options)
            layout = Layout(weight.shape, shape.groups, shape.transposed)
            rows, ours, start = (layout.rows(t.detach()) for t in (weight_grad, weight, layer.weight))
            # |dz|^2 = (G_W . W~ + G_b b~) / q^2, the form that does not need z
            change = ((rows * ours).sum(-1).flatten() + (0 if bias is None else bias_grad * bias)) / metric.divisor
            spread = (start.square() * layout.along_in(metric.variance)).sum(-1).flatten()
            factors = bounding_factors(rates[layer.weight] * change.sqrt(), spread.sqrt(), limit)
            bounded += (factors < 1).sum().item()
            expected = layout.weight(ours * layout.units(factors))
            assert torch.allclose(layer.weight.grad, expected, rtol=1e-10, atol=1e-15)
            if bias is not None:
                assert torch.allclose(layer.bias.grad, bias * factors, rtol=1e-10, atol=1e-15)
        assert bounded
        optimizer.step()


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns, and of the largest that is copied."""

    def __init__(self):
        super().__init__()
        self.size = self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        size = max([0, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        self.size = max(self.size, size)
        if func in {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}:
            self.copied = max(self.copied, size)
        return out


def linear_stack():
    return nn.Sequential(*(nn.Linear(160, 160) for _ in range(4))), torch.randn(8, 160)


def channels_last_stack():
    model = nn.Sequential(*(nn.Conv2d(48, 48, 3, padding=1, groups=1 + i % 2, bias=False) for i in range(4)))
    return model.to(memory_format=torch.channels_last), torch.randn(2, 48, 4, 4).to(memory_format=torch.channels_last)


def channels_last_volumes():
    model = nn.Sequential(*(nn.Conv3d(32, 32, 3, padding=1) for _ in range(4)))
    x = torch.randn(2, 32, 4, 4, 4)
    return model.to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("make", [linear_stack, channels_last_stack, channels_last_volumes])
def test_large_layers_are_stepped_where_they_lie_one_after_another(make):
    model, x = make()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    BNP(model, max_change=0.05).attach(optimizer)
    for step in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        places = [p.grad.data_ptr() for p in model.parameters()]
        with Largest() as largest:
            optimizer.step()
        assert largest.size == model[0].weight.numel(), "gradients of several layers were joined"
        assert step == 0 or largest.copied < 2048, "a gradient or a weight was copied"  # in the first step momentum is
        assert places == [p.grad.data_ptr() for p in model.parameters()]


def test_a_bound_needs_the_learning_rate():
    model = mlp()
    bnp = BNP(model, max_change=0.1)
    model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(ValueError, match="attach the optimizer first"):
        bnp.precondition_()


def test_a_gradient_that_a_fused_optimizer_will_unscale_is_bounded_as_the_true_one():
    torch.manual_seed(0)
    x, grads = torch.randn(4, 6), []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        model = mlp()
        optimizer = SGD(model.parameters(), lr=5.0)
        bnp = BNP(model, max_change=0.1)
        bnp.attach(optimizer)
        optimizer.grad_scale = torch.tensor(scale)
        (model(x).square().sum() * scale).backward()
        bnp.precondition_()
        grads.append(model[0].weight.grad / scale)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["bnp", "bnp-paper", "group+bnp"])
def test_a_unit_changes_by_a_twentieth_of_its_spread_at_most_except_in_the_papers_form(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model, optimizer = normkit.apply(name, model.double(), lr=3.0)
    x = torch.randn(64, 6, dtype=torch.float64)
    x = 8 * torch.linalg.qr(x - x.mean(0))[0]  # uncorrelated, as the metric takes them to be
    before = model[0](x).detach()
    model(x).square().sum().backward()
    optimizer.step()
    change = (model[0](x) - before).square().mean(0).sqrt() / before.std(0, correction=0)
    if name == "bnp-paper":
        assert change.min() > 1
    else:  # a lasting gradient carries ten times as far, at momentum 0.9
        assert change.tolist() == pytest.approx([0.005] * 8, rel=0.01)


@pytest.mark.parametrize("name", ["bnp", "bnp-paper", "bnp-adam", "group+bnp"])
@pytest.mark.parametrize("batch", [1, 8])
def test_recipes_train_a_network_whose_batch_normalization_they_replace(name, batch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2)
    )
    model, optimizer = normkit.apply(name, model, lr=0.01 if "adam" in name else 0.02)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    losses = []
    for _ in range(480 // batch):
        y = torch.randint(2, (batch,))
        x = torch.randn(batch, 1, 6, 6)
        x[:, :, 2:4, 2:4] += 3 * y.float().reshape(-1, 1, 1, 1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    half = len(losses) // 2
    assert sum(losses[half:]) < 0.7 * sum(losses[:half])
