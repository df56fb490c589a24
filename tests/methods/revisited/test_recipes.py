"""The recipes of the revisited scale do what the functions do, and the training loop does not change."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.methods.catalog import METHODS
from normkit.methods.revisited.revisit import revision_of
from normkit.study.models import build_model

NAMES = [name for name in normkit.recipes() if name.startswith("revisited") or name in {"zero-gamma", "batch+input"}]


def resnet():
    torch.manual_seed(0)
    return build_model("resnet20", input_shape=(3, 8, 8), classes=4)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_with_an_unchanged_loop(name, optimizer):
    model, opt = normkit.apply(name, resnet(), lr=0.01, weight_decay=1e-4, optimizer=optimizer)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    for _ in range(2):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
    assert loss.isfinite()
    assert {p for group in opt.param_groups for p in group["params"]} == set(model.parameters())


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("revisited", "paper"),
        ("revisited+input", "paper"),
        ("revisited-logit-scale", "logit_scale"),
        ("revisited-shift-lr", "shift_lr"),
        ("revisited-both", "both"),
        ("revisited-scale-lr", "scale_lr"),
    ],
)
def test_recipe_is_its_arm_and_decays_weights_alone(name, arm):
    model, optimizer = normkit.apply(name, resnet(), lr=0.1, weight_decay=1e-4)
    assert revision_of(model).arm == arm
    assert {g["name"].split()[0]: g["weight_decay"] for g in optimizer.param_groups} == {
        "weights": 1e-4,
        "biases": 0.0,
        "norm-scales": 0.0,
        "norm-shifts": 0.0,
    }


def test_input_recipe_takes_the_channels_from_batches_or_from_the_first_layer():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    model, _ = normkit.apply("revisited+input", flat, lr=0.1, batches=[torch.rand(5, 3, 2, 2)])
    assert model.input_norm.channels == 3
    model, _ = normkit.apply("revisited+input", resnet(), lr=0.1)
    assert model.input_norm.channels == 3
    assert torch.allclose(model.input_norm.weight, torch.tensor(0.058))
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        normkit.apply("revisited+input", nn.Sequential(nn.BatchNorm1d(3)), lr=0.1)


def test_the_input_is_normalized_alone_before_plain_batch_normalization():
    model, optimizer = normkit.apply("batch+input", resnet(), lr=0.1, weight_decay=1e-4)
    assert torch.allclose(model.input_norm.weight, torch.tensor(0.58))
    assert revision_of(model) is None
    plain = resnet().state_dict()
    assert all(torch.equal(plain[key], value) for key, value in model.model.state_dict().items())
    assert [g["name"] for g in optimizer.param_groups if g["weight_decay"]] == ["weights"]


def test_zero_gamma_recipe_changes_the_last_scales_and_nothing_else():
    plain = resnet().state_dict()
    model, _ = normkit.apply("zero-gamma", resnet(), lr=0.1)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(plain[key], value)]
    assert len(changed) == 9
    assert all(key.endswith("norm2.weight") for key in changed)


def test_no_recipe_hides_another_of_its_name():
    assert len(normkit.recipes()) == sum(len(method.recipes) for method in METHODS)


def test_deployed_model_has_no_normalization_left_and_is_the_same_function():
    model, optimizer = normkit.apply("revisited+input", resnet().double(), lr=0.1)
    x, y = torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    folded = normkit.fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d | normkit.InputNorm) for m in folded.modules())
    assert torch.allclose(folded(x), model.eval()(x), rtol=0, atol=1e-10)
