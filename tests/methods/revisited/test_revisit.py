"""The revisited initial scale: what it sets, what it marks, and what it is equivalent to."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.methods.revisited.revisit import revision, revision_of, revisit
from normkit.study.models import build_model


class Block(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class SmallResNet(nn.Module):
    """``feature_scale`` multiplies the pooled features; it is written out here, not taken from the package."""

    def __init__(self, feature_scale=1.0):
        super().__init__()
        self.feature_scale = feature_scale
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem_norm(self.stem(x))), 2)
        return self.classifier(self.feature_scale * F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))

    def norms(self):
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]


def train(model, optimizer, steps):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.rand(16, 3, 8, 8, generator=rng, dtype=torch.float64)
        y = torch.randint(5, (16,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize(("scale", "divisor"), [(0.1, 100.0), (0.3, 10.0)])
def test_it_is_a_network_of_scale_one_with_scaled_features_rates_and_eps(scale, divisor):
    """60 SGD-momentum steps in float64: parameters agree to 1e-12 after the change of variables."""
    torch.manual_seed(0)
    revisited = SmallResNet().double()
    reference = SmallResNet(feature_scale=scale).double()
    reference.load_state_dict(revisited.state_dict())
    for norm in reference.norms()[1:]:  # the stem sees the data, which do not scale
        norm.eps /= scale**2

    lr, decay = 0.1, 1e-3
    revisit(revisited, scale=scale, scale_lr_divisor=divisor)
    groups = normkit.param_groups(revisited, lr=lr, weight_decay=decay)
    train(revisited, torch.optim.SGD(groups, lr=lr, momentum=0.9), 60)

    gammas, betas = [m.weight for m in reference.norms()], [m.bias for m in reference.norms()]
    weights = [m.weight for m in reference.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    by_hand = [
        {"params": weights, "weight_decay": decay},
        {"params": [reference.classifier.bias]},
        {"params": gammas, "lr": lr / (divisor * scale**2)},
        {"params": betas, "lr": lr / scale**2},
    ]
    before = [w.clone() for w in weights]
    train(reference, torch.optim.SGD(by_hand, lr=lr, momentum=0.9), 60)

    assert min((w - b).norm() for w, b in zip(weights, before, strict=True)) > 1e-2  # it did train
    expected = dict(reference.named_parameters())
    scaled = {id(p) for p in gammas + betas}
    for name, parameter in revisited.named_parameters():
        factor = scale if id(expected[name]) in scaled else 1.0
        assert (parameter - factor * expected[name]).abs().max() < 1e-12, name


def test_evaluation_before_training_is_that_network_too_and_trained_statistics_stay():
    torch.manual_seed(0)
    model = SmallResNet().double()
    reference = SmallResNet(feature_scale=0.1).double()
    reference.load_state_dict(model.state_dict())
    for norm in reference.norms()[1:]:
        norm.eps *= 100
    revisit(model)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(model.eval()(x), reference.eval()(x), rtol=0, atol=1e-12)

    trained = SmallResNet().double()
    trained(x)
    before = [norm.running_var.clone() for norm in trained.norms()]
    revisit(trained)
    assert all(torch.equal(a, norm.running_var) for a, norm in zip(before, trained.norms(), strict=True))


def test_arm_both_is_the_paper_at_its_defaults():
    """The arm trains the same logits as the recipe, once eps is scaled with it."""
    torch.manual_seed(0)
    paper = SmallResNet().double()
    both = copy.deepcopy(paper)
    for norm in both.norms()[1:]:
        norm.eps *= 100
    for model, arm in ((paper, "paper"), (both, "both")):
        revisit(model, arm=arm)
        groups = normkit.param_groups(model, lr=0.1)
        train(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9), 20)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(paper(x), both(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arm", "gamma", "gamma_lr", "beta_lr", "features"),
    [
        ("paper", 0.1, 0.01, 1.0, 1.0),
        ("logit_scale", 1.0, 1.0, 1.0, 0.1),
        ("shift_lr", 1.0, 1.0, 100.0, 1.0),
        ("both", 1.0, 1.0, 100.0, 0.1),
        ("scale_lr", 1.0, 0.01, 1.0, 1.0),
    ],
)
def test_each_arm_changes_its_piece_alone(arm, gamma, gamma_lr, beta_lr, features):
    torch.manual_seed(0)
    model = SmallResNet()
    revisit(model, arm=arm)
    assert all(torch.allclose(norm.weight, torch.tensor(gamma)) and not norm.bias.any() for norm in model.norms())
    rates = {id(p): group["lr"] for group in normkit.param_groups(model, lr=1.0) for p in group["params"]}
    for norm in model.norms():
        assert rates[id(norm.weight)] == pytest.approx(gamma_lr)
        assert rates[id(norm.bias)] == pytest.approx(beta_lr)
    assert {rates[id(m.weight)] for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {1}
    x = torch.rand(2, 8)
    plain = F.linear(x, model.classifier.weight, model.classifier.bias)
    assert torch.equal(model.classifier(x), plain) == (features == 1)
    assert torch.allclose(model.classifier(x), F.linear(features * x, model.classifier.weight, model.classifier.bias))


@pytest.mark.parametrize("arm", ["logit_scale", "both"])
def test_the_factor_on_the_features_is_part_of_the_function(arm):
    torch.manual_seed(0)
    model = SmallResNet().eval()
    x = torch.rand(2, 3, 8, 8)
    bias = model.classifier.bias
    before = model(x) - bias
    revisit(model, arm=arm)
    assert torch.allclose(model(x) - bias, 0.1 * before, atol=1e-7)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


class ResetsGamma(nn.Sequential):
    """A builder that sets every gamma to 1, the last of each block to 0 and beta to 3, after construction."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4))
        self.append(nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(64, 1), nn.BatchNorm1d(1)))
        nn.init.ones_(self[1].weight)
        nn.init.zeros_(self[4].weight)
        nn.init.constant_(self[5][3].bias, 3)


def test_scale_is_set_on_the_built_model_on_every_batchnorm_by_type():
    model = revisit(ResetsGamma(), scale=0.2)
    for norm in (model[1], model[4], model[5][3]):
        assert torch.allclose(norm.weight, torch.tensor(0.2))
        assert not norm.bias.any()


def test_groups_give_gamma_its_rate_and_nobody_but_weights_decay():
    model = revisit(ResetsGamma())
    groups = {
        g["name"]: (len(g["params"]), g["lr"], g["weight_decay"])
        for g in normkit.param_groups(model, lr=0.1, weight_decay=1e-4)
    }
    assert groups == {
        "weights": (3, 0.1, 1e-4),
        "biases": (3, 0.1, 0.0),
        "norm-scales (lr x 0.01)": (3, pytest.approx(0.001), 0.0),
        "norm-shifts": (3, 0.1, 0.0),
    }


def test_marks_survive_deepcopy_and_pickle_and_are_visible():
    model = revisit(SmallResNet())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert revision_of(twin) == revision("paper", 0.1, 100.0)
        assert [g["lr"] for g in normkit.param_groups(twin, lr=1.0) if g["name"].startswith("norm-sc")] == [0.01]
    assert revision_of(SmallResNet()) is None


def test_a_frozen_scale_stays_frozen():
    model = SmallResNet()
    model.stem_norm.weight.requires_grad_(False)
    revisit(model)
    assert not model.stem_norm.weight.requires_grad
    assert torch.allclose(model.stem_norm.weight, torch.tensor(0.1))


@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, lambda m: nn.Sequential(nn.Flatten(), m)])
def test_a_second_time_is_refused_and_changes_nothing(again):
    model = again(revisit(SmallResNet()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"stem_norm is revisited \(paper\).*already"):
        revisit(model, scale=0.5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), {}, "no BatchNorm with a scale"),
        (nn.Sequential(nn.BatchNorm1d(2, affine=False)), {}, "no BatchNorm with a scale"),
        (
            nn.Sequential(nn.BatchNorm1d(2), nn.LazyBatchNorm1d()),
            {},
            r"1 \(LazyBatchNorm1d\) does not know its features",
        ),
        (nn.Sequential(nn.BatchNorm1d(2)), {"scale": 0.0}, "scale is 0.0"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"scale_lr_divisor": float("nan")}, "scale_lr_divisor is nan"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"arm": "logits"}, "unknown arm 'logits'"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"arm": "both"}, "no linear layer"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(model, kwargs, message):
    before = copy.deepcopy(list(model.parameters())) if not any(map(nn.parameter.is_lazy, model.parameters())) else None
    with pytest.raises(ValueError, match=message):
        revisit(model, **kwargs)
    if before is not None:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert revision_of(model) is None


def test_scale_of_an_input_norm_is_multiplied():
    model = revisit(nn.Sequential(normkit.InputNorm(3), SmallResNet()))
    assert torch.allclose(model[0].weight, torch.tensor(0.058))


def test_a_residual_network_trains_from_the_small_scale():
    torch.manual_seed(0)
    model = revisit(build_model("resnet20", input_shape=(3, 8, 8), classes=4))
    optimizer = torch.optim.SGD(normkit.param_groups(model, lr=0.1, weight_decay=1e-4), momentum=0.9)
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_describe_shows_the_revision_and_conversion_keeps_it():
    model = revisit(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    line = "revisited (paper): scale starts at 0.1, its learning rate x 0.01, the shift's x 1"
    assert str(normkit.describe(model)[0]) == f"1: BatchNorm2d(8); {line}"
    normkit.convert(model, "group")
    assert line in str(normkit.describe(model)[0])
    assert 0.01 in [group["lr"] for group in normkit.param_groups(model, lr=1.0)]
    normkit.revert(model)
    assert revision_of(model) == revision("paper", 0.1, 100.0)


def test_a_scale_without_a_shift_is_revisited_too():
    model = normkit.revisit(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, bias=False)))
    assert model[1].weight.tolist() == pytest.approx([0.1] * 3)


def test_the_classifiers_input_is_scaled_also_as_a_keyword():
    class Net(nn.Sequential):
        def forward(self, x):
            return self[2](input=self[1](self[0](x)))

    models = [cls(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval() for cls in (nn.Sequential, Net)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(5, 3)
    for model in models:
        normkit.revisit(model, arm="logit_scale")
    assert torch.equal(models[0](x), models[1](x))
    torch.testing.assert_close(normkit.fold(models[0])(x), models[0](x))
