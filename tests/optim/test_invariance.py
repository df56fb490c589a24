import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.optim.invariance import TOLERANCE, scale_invariance
from normkit.study.models.wide_resnet import wide_resnet
from tests.cases import batch_loss


class Classifier(nn.Module):
    """Convolutions in many surroundings; ``expected`` says which may be scaled filter by filter."""

    expected: ClassVar = {
        "plain": True,
        "biased": True,
        "dropped": True,
        "pooled": True,
        "biased_dropped": False,
        "biased_pooled": False,
        "summed": False,
        "grouped": False,
        "lone_groups": True,
        "layered": False,
        "last": False,
    }

    def __init__(self):
        super().__init__()
        self.plain, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.biased, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.dropped, self.norm3 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.InstanceNorm2d(4)
        self.biased_dropped, self.norm10 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.pooled, self.norm4 = nn.Conv2d(4, 4, 3, padding=1, bias=False), normkit.LpNorm2d(4, p=1)
        self.biased_pooled, self.norm5 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.summed = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm6 = nn.BatchNorm2d(4)
        self.grouped, self.norm7 = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.lone_groups, self.norm8 = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(4, 4)
        self.layered, self.norm9 = nn.Linear(4, 4), nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)
        for module in self.modules():
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)

    def forward(self, x):
        x = torch.relu(self.norm1(self.plain(x)))
        x = torch.relu(self.norm2(self.biased(x)))
        x = F.relu(self.norm3(self.drop(self.dropped(x))))
        x = torch.relu(self.norm10(self.drop(self.biased_dropped(x))))
        x = self.norm4(F.max_pool2d(F.relu(self.pooled(x)), 2))
        x = self.norm5(F.relu(self.biased_pooled(x)))
        x = self.norm6(self.summed(x) + x)
        x = torch.relu(self.norm7(self.grouped(x)))
        x = torch.relu(self.norm8(self.lone_groups(x)))
        x = torch.tanh(self.norm9(self.layered(x.mean((2, 3)))))
        return self.last(x)


class Untraceable(Classifier):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 2


def build(cls=Classifier):
    torch.manual_seed(0)
    return cls()


def verdicts(report):
    return {name.removesuffix(".weight"): entry.invariant for name, entry in report.items()}


def test_structure_tells_which_weights_may_be_scaled_filter_by_filter():
    assert verdicts(scale_invariance(build())) == Classifier.expected


def test_a_measured_gradient_confirms_structure():
    report = scale_invariance(build(), batch_loss, batch())
    assert verdicts(report) == Classifier.expected
    for name, expected in Classifier.expected.items():
        assert (report[f"{name}.weight"].alignment <= TOLERANCE) == expected


def test_scaling_a_filter_changes_the_output_exactly_where_the_report_says():
    model, (x, _) = build().double(), batch()
    for norm in model.modules():
        if hasattr(norm, "eps"):
            norm.eps = 1e-12

    def output(model):
        torch.manual_seed(3)  # the same dropout
        return model(x.double())

    for name, entry in scale_invariance(model).items():
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.get_parameter(name)[1].mul_(3.0)
        change = (output(scaled) - output(model)).abs().max()
        assert (change < 1e-8) == entry.invariant, name


def test_models_that_do_not_trace_are_decided_by_measurement():
    by_structure = scale_invariance(build(Untraceable))
    assert not any(entry.invariant for entry in by_structure.values())
    assert "give objective and batch" in by_structure["plain.weight"].reason
    measured = scale_invariance(build(Untraceable), batch_loss, batch())
    assert verdicts(measured) == Classifier.expected
    assert measured["biased.weight"].norms == ("norm2",)


def test_measuring_leaves_the_model_as_it_was():
    model = build()
    model.plain.weight.grad = torch.ones_like(model.plain.weight)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.norm2.eval()
    scale_invariance(model, batch_loss, batch())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert model.plain.weight.grad.eq(1).all()
    assert model.training
    assert not model.norm2.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_that_sees_the_weight_otherwise_is_noticed():
    def penalised(model, batch):
        return batch_loss(model, batch) + model.plain.weight.square().sum()

    entry = scale_invariance(build(), penalised, batch())["plain.weight"]
    assert not entry.invariant
    assert "feeds norm1 only, but" in entry.reason


def test_frozen_normalizations_and_transposed_or_tiny_filters_are_named():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)),
    )
    model[1].eval()
    reasons = {name: entry.reason for name, entry in scale_invariance(model).items()}
    assert "frozen" in reasons["0.weight"]
    assert "transposed" in reasons["2.weight"]
    assert "one element" in reasons["4.weight"]


def test_the_papers_rule_takes_convolutions_with_fewer_filters_than_elements_invariant_or_not():
    """The published shares for a wide ResNet."""
    model = wide_resnet(28, 10, 3, 10)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    report = scale_invariance(model, rule="paper")
    chosen = {name: entry for name, entry in report.items() if entry.manifold}
    total = sum(sizes[name] for name in chosen)
    exact = sum(sizes[name] for name, entry in chosen.items() if entry.invariant)
    assert total / sum(sizes.values()) == pytest.approx(0.992, abs=5e-4)
    assert exact / total == pytest.approx(0.465, abs=5e-4)
    assert "17.weight" not in chosen  # the classifier
    square = scale_invariance(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)), rule="paper")
    assert [entry.manifold for entry in square.values()] == [False, True]


def test_tied_weights_must_be_invariant_in_every_use():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten())
    model[2].weight = model[0].weight
    report = scale_invariance(model)
    assert list(report) == ["0.weight"]
    assert not report["0.weight"].invariant


def test_rows_of_a_linear_layer_that_are_normalized_together_may_not_be_scaled_alone():
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(7), nn.Flatten(), nn.Linear(28, 2))
    x, labels = torch.randn(6, 7, 5), torch.arange(6) % 2
    entry = scale_invariance(model)["0.weight"]
    assert not entry.invariant
    assert entry.reason == "1: normalizes other channels than the 4 outputs"
    measured = scale_invariance(model, lambda m, b: F.cross_entropy(m(b), labels), x)["0.weight"]
    assert measured.alignment > 0.01


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="rule='both'"):
        scale_invariance(build(), rule="both")
    with pytest.raises(ValueError, match="give both"):
        scale_invariance(build(), batch_loss)
    with pytest.raises(ValueError, match=r"1: LazyLinear does not know its features yet; run one batch"):
        normkit.apply("sgd-g", nn.Sequential(nn.BatchNorm1d(2), nn.LazyLinear(3)), lr=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_unit_filters_keep_the_function_in_train_and_eval_mode(training):
    model, (x, _) = build().double(), batch()
    model.drop.p = 0.0
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-14
    for _ in range(3):
        model(x.double())  # running statistics of their own
    before = copy.deepcopy(model).train(training)(x.double())
    groups = normkit.param_groups(model, lr=0.01, manifold_lr=0.2)
    assert torch.allclose(model.train(training)(x.double()), before, rtol=1e-8, atol=1e-8)
    sphere = next(group for group in groups if group["manifold"])
    assert len(sphere["params"]) == sum(Classifier.expected.values())
    assert all(torch.allclose(p.flatten(1).norm(dim=1), torch.ones(4).double()) for p in sphere["params"])


def test_the_user_is_told_which_weights_change_the_function_when_they_are_put_on_the_sphere():
    model = build()
    with pytest.warns(
        UserWarning, match=r"4 of 9 weights: biased_dropped.weight \(its bias .*summed.weight \(goes into"
    ):
        normkit.param_groups(model, lr=0.01, manifold_lr=0.2, rule="paper")


def test_a_filter_without_direction_is_named_before_anything_changes():
    model = build()
    with torch.no_grad():
        model.biased.weight[2] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"biased.weight: filter 2 .1 in all. has length 0.0"):
        normkit.param_groups(model, lr=0.01, manifold_lr=0.2)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_every_parameter_stands_in_one_group_with_its_rate_and_decay():
    model = build()
    groups = {g["name"]: g for g in normkit.param_groups(model, lr=0.01, manifold_lr=0.2, weight_decay=5e-4)}
    assert sorted(p.numel() for g in groups.values() for p in g["params"]) == sorted(
        p.numel() for p in model.parameters()
    )
    assert (groups["sphere"]["lr"], groups["sphere"]["weight_decay"], groups["sphere"]["manifold"]) == (0.2, 0.0, True)
    assert (groups["weights"]["lr"], groups["weights"]["weight_decay"], groups["weights"]["manifold"]) == (
        0.01,
        5e-4,
        False,
    )
    assert model.summed.weight in set(groups["weights"]["params"])


@pytest.mark.parametrize("name", ["sgd-g", "adam-g", "sgd-g-paper", "adam-g-paper"])
def test_recipes_train_and_the_request_is_the_manifolds_rate(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    model, optimizer = normkit.apply(name, model, lr=0.1, weight_decay=1e-3)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["sphere"] == pytest.approx(0.1)
    assert rates["weights"] == pytest.approx(0.1 / (20 if name.startswith("sgd-g") else 5))
    losses = []
    for _ in range(30):
        loss = batch_loss(model, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["sgd-g", "adam-g"])
def test_the_papers_recipes_put_weights_on_the_sphere_that_go_into_a_sum(name):
    _, exact = normkit.apply(name, build(), lr=0.1)
    model = build()
    with pytest.warns(UserWarning, match="change the network's function"):
        model, paper = normkit.apply(f"{name}-paper", model, lr=0.1)
    sphere = [{len(g["params"]) for g in o.param_groups if g["name"] == "sphere"}.pop() for o in (exact, paper)]
    assert sphere[1] > sphere[0]
    assert any(model.summed.weight is p for g in paper.param_groups if g["name"] == "sphere" for p in g["params"])


class Noisy(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight + 1, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.sum()


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("layer", "norm", "invariant"),
    [
        (Noisy(4, 6), nn.BatchNorm1d(6), False),
        (Standardised(4, 6, 3), nn.BatchNorm2d(6), True),
        (Padded(4, 6, 3, dilation=2, bias=False), nn.BatchNorm2d(6), True),
    ],
)
def test_a_forward_of_its_own_counts_by_what_it_makes_of_a_scaled_filter(layer, norm, invariant):
    entry = normkit.scale_invariance(nn.Sequential(layer, norm))["0.weight"]
    assert entry.invariant == invariant
    assert invariant or entry.reason == "Noisy has a forward of its own, whose output does not scale with the filters"


def test_a_forward_that_gives_a_tuple_is_no_filter():
    report = normkit.scale_invariance(nn.Sequential(Pair(4, 6), First(), nn.BatchNorm1d(6)))
    assert not report["0.weight"].invariant


def test_a_model_without_trainable_weights_is_told_by_structure_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model[0].weight.requires_grad_(False)
    report = normkit.scale_invariance(model, lambda model, x: model(x).square().mean(), torch.randn(8, 4))
    assert report == normkit.scale_invariance(model)


def test_a_normalization_that_takes_other_inputs_too_keeps_its_statistics_and_is_named():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(x)))

    model = Reused()
    model(torch.randn(4, 3, 5, 5) * 3)
    before = model.norm.running_var.clone()
    with pytest.warns(UserWarning, match="conv.weight .eval mode only: its running statistics are shared"):
        normkit.param_groups(model, lr=0.01, manifold_lr=0.2)
    assert torch.equal(model.norm.running_var, before)


class Dense(nn.Module):
    """Channels of two layers concatenated, as in DenseNet and Inception."""

    def __init__(self, dim=1):
        super().__init__()
        self.dim = dim
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(8 if dim == 1 else 4)
        self.c = nn.Conv2d(self.norm.num_features, 4, 1, bias=False)
        self.last = nn.BatchNorm2d(8)

    def forward(self, x):
        a, b = self.a(x), self.b(x).relu()
        joined = self.norm(torch.cat([a, b], self.dim)).relu()
        return self.last(torch.cat([b, self.c(joined)], 1)) if self.dim == 1 else joined


def test_concatenated_channels_are_scaled_each_by_itself():
    torch.manual_seed(0)
    model, x = Dense().double(), torch.randn(16, 3, 5, 5, dtype=torch.float64) + 1
    for module in (model.norm, model.last):
        module.eps = 1e-12
    for _ in range(30):
        model(x)
    report = scale_invariance(model)
    assert {name: entry.fed for name, entry in report.items() if entry.invariant} == {
        "a.weight": (("norm", 0),),
        "b.weight": (("norm", 4), ("last", 0)),
        "c.weight": (("last", 4),),
    }
    train, evaluated = model(x).detach(), model.eval()(x).detach()
    normkit.param_groups(model, lr=0.1, manifold_lr=0.1)
    torch.testing.assert_close(model(x), evaluated, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(model.train()(x), train, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dim", [0, 2])
def test_what_is_concatenated_along_another_dimension_shares_its_statistics(dim):
    report = scale_invariance(Dense(dim))
    assert not report["a.weight"].invariant
    assert "is not concatenated along its channels" in report["b.weight"].reason
