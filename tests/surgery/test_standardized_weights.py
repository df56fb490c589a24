"""Surgery on models whose convolutions use standardized weights."""

import copy

import pytest
import torch
from torch import nn

import normkit
from normkit.methods.weight_standardization.normalizer_free import normalizer_free
from normkit.methods.weight_standardization.standardize import standardize_weights


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


X = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
MADE = {
    "group+ws": lambda model: standardize_weights(normkit.convert(model, "group")),
    "normalizer-free": lambda model: normalizer_free(normkit.convert(model, "none")),
}


@pytest.mark.parametrize("name", MADE)
def test_revert_gives_back_the_model_and_an_optimizer_goes_on(name):
    model = net().eval()
    expected, keys, parameters = model(X), list(model.state_dict()), dict(model.named_parameters())
    MADE[name](model)
    assert not torch.allclose(model(X), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.revert(model, optimizer=optimizer)
    assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in parameters.values()}


def test_revert_goes_where_it_is_told():
    model = MADE["group+ws"](net())
    normkit.revert(model, where=["0"])
    assert [nn.utils.parametrize.is_parametrized(model[i]) for i in (0, 3, 6)] == [False, True, True]


@pytest.mark.parametrize("name", MADE)
def test_plain_checkpoints_load_and_a_copy_computes_the_same(name):
    plain, model = net(), MADE[name](net())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    model.load_state_dict(plain.state_dict(), strict=name == "group+ws")  # without norms, theirs are left over
    assert torch.equal(model[0].parametrizations.weight.original, plain[0].weight)
    assert torch.equal(copy.deepcopy(model)(X), model(X))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.filterwarnings("ignore:fold. 3 layers stay")  # GroupNorm
def test_fold_leaves_plain_layers_of_torch(name):
    model = MADE[name](net()).eval()
    folded = normkit.fold(model)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-5, atol=1e-6)
    assert [type(folded[i]) for i in (0, 3, 6)] == [nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d]
    assert nn.utils.parametrize.is_parametrized(model[0])


def test_describe_says_whose_weights_are_standardized():
    words = [str(row) for row in normkit.describe(MADE["normalizer-free"](net()))]
    assert "0: ParametrizedConv2d with ScaledWeightStandardization(8)" in words
