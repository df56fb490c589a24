import copy
import warnings

import pytest
import torch
from torch import nn

import evenkeel
from evenkeel.surgery import convert, revert
from evenkeel.targets import Bias


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4),
    )  # fmt: skip


def trained_net():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8) * 2 + 1).square().mean().backward()
        optimizer.step()
    return model


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.mark.parametrize("to", ["group", "layer", "none"])
def test_convert_then_revert_is_the_identity_in_eval(to):
    model = trained_net().eval()
    expected, keys = model(X), list(model.state_dict())
    assert convert(model, to) is model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert not torch.equal(model(X), expected)
    assert revert(model) is model
    assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("to", ["group", "layer"])
def test_state_dicts_load_both_ways(to):
    plain, converted = trained_net(), convert(small_net(), to)
    converted.load_state_dict(plain.state_dict())
    plain.load_state_dict(converted.state_dict())
    assert torch.equal(revert(converted).eval()(X), plain.eval()(X))


def test_none_gives_the_layer_before_its_bias_back_or_leaves_a_bias_in_place():
    model = convert(small_net(), "none")
    assert [type(model[i]) for i in (1, 4, 5, 9)] == [nn.Identity, nn.Identity, nn.Identity, nn.Identity]
    assert torch.equal(model[0].bias, torch.zeros(16))
    assert torch.equal(model[8].bias, torch.zeros(4))
    assert isinstance(convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "none")[1], Bias)


def test_a_bias_trained_in_place_of_a_norm_is_absorbed_by_its_running_mean_on_revert():
    model = trained_net().eval()
    norm = copy.deepcopy(model[1])
    convert(model, "none")
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    with_bias = model[0](X)
    revert(model)
    assert model[0].bias is None
    torch.testing.assert_close(model[1](model[0](X)), norm(with_bias))


def test_the_parameters_stay_the_same_objects_and_convert_is_idempotent():
    model = small_net()
    weight = model[1].weight
    convert(model, "group")
    layers = list(model.modules())
    assert model[1].weight is weight
    assert list(convert(model, "group").modules()) == layers
    assert (model[1].num_groups, model[9].num_groups) == (4, 1)


def test_converting_on_is_as_if_reverted_first():
    model = trained_net().eval()
    expected = model(X)
    for to in ("none", "layer", "group", "none", "batch"):
        convert(model, to)
    assert torch.equal(model(X), expected)
    assert type(model[1]) is nn.BatchNorm2d


def test_one_layer_at_two_places_is_replaced_by_one_layer_at_both():
    norm = nn.BatchNorm2d(8)
    model = convert(nn.Sequential(norm, nn.ReLU(), norm), "group")
    assert isinstance(model[0], nn.GroupNorm)
    assert model[0] is model[2]


def test_a_model_that_is_a_norm_itself_comes_back_replaced():
    assert isinstance(convert(nn.BatchNorm2d(8), "group"), nn.GroupNorm)


def test_a_model_without_norms_gives_a_warning_and_works():
    with pytest.warns(UserWarning, match="no normalization layer"):
        model, optimizer = evenkeel.apply("group", nn.Linear(2, 2), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 2


@pytest.mark.parametrize("name", ["none", "batch", "group", "layer"])
def test_every_recipe_trains(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = evenkeel.apply(name, small_net(), lr=0.01)
    before = [p.clone() for p in model.parameters()]
    model(X).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
