"""Standardized filters against their definition, filter by filter in float64, for every kind of convolution."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import normkit
from normkit.methods.weight_standardization.normalizer_free import ScaledWeightStandardization
from normkit.methods.weight_standardization.standardize import (
    WeightStandardization,
    is_standardized,
    parametrize_filters,
    reasons,
    scaled_standardize,
    standardize,
    standardize_weights,
    unparametrize_filters,
)

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 4)),
    "transposed 2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, 2, bias=False), (1, 4, 2, 2, 2)),
}


def by_filter(layer, change):
    """A weight whose filters, found index by index, are changed one after the other."""
    weight = layer.weight.detach().clone()
    for channel in range(layer.out_channels):
        if layer.transposed:
            group, own = divmod(channel, layer.out_channels // layer.groups)
            size = layer.in_channels // layer.groups
            weight[group * size : (group + 1) * size, own] = change(
                weight[group * size : (group + 1) * size, own], channel
            )
        else:
            weight[channel] = change(weight[channel], channel)
    return weight


def standardized(filter_, _):
    variance = (filter_ - filter_.mean()).square().mean()
    return (filter_ - filter_.mean()) / (variance + 1e-10).sqrt()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_convolution_uses_filters_of_mean_zero_and_deviation_one(name):
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    layer, x = make().double(), torch.randn(shape).double()
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight.copy_(by_filter(layer, standardized))
    parametrize_filters(layer, WeightStandardization(layer))
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d])
@pytest.mark.parametrize("function", [standardize, scaled_standardize])
def test_channels_last_filters_are_standardized_as_the_plain_ones_and_stay_channels_last(function, memory_format):
    shape = (4, 3, 5, 2) if memory_format == torch.channels_last else (4, 3, 5, 2, 2)
    plain = torch.randn(shape, dtype=torch.float64)
    last = plain.contiguous(memory_format=memory_format)
    torch.testing.assert_close(function(last), function(plain), rtol=1e-12, atol=1e-12)
    assert function(last).is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradgradcheck(function, last.requires_grad_())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_scaled_filters_have_length_gamma_times_gain_times_skip_gain(name):
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    layer, x = make().double(), torch.randn(shape).double()
    expected, gains = copy.deepcopy(layer), torch.rand(layer.out_channels).double() + 0.5

    def scaled(filter_, channel):
        centred = filter_ - filter_.mean()
        return 1.7 * 0.3 * gains[channel] * centred / (filter_.numel() * centred.square().mean()).sqrt()

    with torch.no_grad():
        expected.weight.copy_(by_filter(layer, scaled))
        parametrization = ScaledWeightStandardization(layer, 1.7, ends_branch=True)
        parametrization.gain.copy_(gains)
        parametrization.skip_gain.fill_(0.3)
    parametrize_filters(layer, parametrization)
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_definition():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 5, 5).double()
    weight = layer.weight.detach().clone().requires_grad_()
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    used = (centred / (centred.square().mean(1, keepdim=True) + 1e-10).sqrt()).view_as(weight)
    nn.functional.conv2d(x, used, layer.bias.detach()).square().sum().backward()
    parametrize_filters(layer, WeightStandardization(layer))
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, weight.grad, rtol=1e-10, atol=1e-10)


def test_the_output_does_not_depend_on_mean_and_scale_of_the_filters():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 5, 5).double()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(1000).add_(7)
    for conv in (layer, other):
        parametrize_filters(conv, WeightStandardization(conv))
    torch.testing.assert_close(layer(x), other(x), rtol=1e-3, atol=1e-3)


def test_a_filter_whose_weights_are_all_equal_has_finite_gradients():
    layer = nn.Conv2d(3, 4, 3)
    nn.init.constant_(layer.weight, 0.5)
    parametrize_filters(layer, WeightStandardization(layer))
    layer(torch.randn(1, 3, 4, 4)).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("kind", [WeightStandardization, ScaledWeightStandardization])
def test_plain_checkpoints_load_and_the_layers_own_come_back(kind):
    plain, layer = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    parametrize_filters(layer, kind(layer))
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.parametrizations.weight.original, plain.weight)
    again = nn.Conv2d(3, 4, 3)
    parametrize_filters(again, kind(again))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(again(x), layer(x))


def test_undone_it_is_the_layer_it_was():
    layer = nn.Conv2d(3, 4, 3)
    weight, names, kind, x = layer.weight, list(layer.state_dict()), type(layer), torch.randn(1, 3, 4, 4)
    expected = layer(x)
    parametrize_filters(layer, WeightStandardization(layer))
    assert not torch.allclose(layer(x), expected)
    unparametrize_filters(layer)
    assert layer.weight is weight
    assert list(layer.state_dict()) == names
    assert type(layer) is kind
    assert not layer._load_state_dict_pre_hooks
    assert torch.equal(layer(x), expected)


def test_undone_in_a_copy_it_stays_in_the_original():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 4, 4)
    parametrize_filters(layer, WeightStandardization(layer))
    expected, copied = layer(x), copy.deepcopy(layer)
    unparametrize_filters(copied)
    assert type(copied) is nn.Conv2d
    assert torch.equal(layer(x), expected)
    unparametrize_filters(layer)
    assert torch.equal(layer(x), copied(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_standardized_in_single_precision(dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 4, 3).to(dtype)
    expected = by_filter(copy.deepcopy(layer).double(), standardized)
    parametrize_filters(layer, WeightStandardization(layer))
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-2, atol=1e-2)


class Own(nn.Conv2d):
    def forward(self, input):
        return super().forward(input).relu()


def before_norms(*convolutions):
    """A model in which a GroupNorm follows each layer."""
    return nn.Sequential(*(part for layer in convolutions for part in (layer, nn.GroupNorm(2, 4))))


def are_standardized(model):
    return {path for path, layer in model.named_modules() if is_standardized(layer)}


def test_what_cannot_be_standardized_is_named_and_left(caplog):
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
    pruned = prune.identity(nn.Conv2d(4, 4, 1), "weight")
    constant = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(constant.weight[2])
    kept = {
        nn.Conv2d(4, 4, 1, groups=4): "its filters have 1 weight)",
        nn.Conv2d(4, 4, 1, groups=2): "its filters have 2 weights)",
        Own(4, 4, 3): "Own has a forward",
        spectral: "its weight is computed from other parameters already",
        pruned: "its weight is computed from other parameters already",
        nn.Conv2d(4, 4, 3, dtype=torch.complex64): "its weights are torch.complex64",
        constant: "it has filters of equal weights",
    }
    model = before_norms(nn.Conv2d(3, 4, 1), *kept)
    with caplog.at_level(logging.WARNING, logger="normkit"):
        standardize_weights(model)
    assert are_standardized(model) == {"0"}
    for place, reason in enumerate(kept.values(), start=1):
        assert f"{2 * place} ({reason}" in caplog.text
    with caplog.at_level(logging.WARNING, logger="normkit"):
        standardize_weights(nn.Linear(2, 2))
        standardize_weights(nn.Conv2d(3, 4, 3))
    assert "no convolution, so no weight is standardized" in caplog.text
    assert "no convolution in front of a group normalization that could be used" in caplog.text
    with pytest.raises(ValueError, match="run one batch"):
        standardize_weights(nn.Sequential(nn.LazyConv2d(4, 3)))


class Branches(nn.Module):
    """A stem, a pre-activated residual block with a gate, a concatenation, and two heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(1, 4)
        self.inner, self.between, self.outer = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1)
        self.gate, self.side = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.last, self.after, self.head = nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 3, 1)
        self.frozen, self.stays = nn.Conv2d(4, 4, 1).requires_grad_(False), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        y = self.between(self.inner(torch.relu(self.norm(x))))
        x = x + 0.5 * self.outer(y) * 1.0
        x = torch.cat([torch.relu(x), self.side(y * torch.sigmoid(self.gate(y)))], 1)
        seen = self.norm(self.frozen(y)), self.stays(self.stem(y[:, :3]))
        return self.head(torch.relu(self.after(self.last(x)))), seen


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = Branches()
        self.outside, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)

    def forward(self, x):
        return self.inside(x), self.norm(self.outside(x)) if x.sum() > 0 else None


def test_only_convolutions_whose_output_reaches_group_normalizations_alone_are_standardized():
    model = standardize_weights(Branches())
    assert are_standardized(model) == {"inner", "outer", "side"}
    left = reasons(model, {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)})
    assert {path: left[path] for path in ("stem", "gate", "after", "head", "frozen")} == {
        "stem": "no group normalization between it and stays",
        "gate": "no group normalization between it and sigmoid",
        "after": "no group normalization between it and head",
        "head": "no group normalization between it and the output of the model",
        "frozen": "it is frozen",
    }


def test_a_model_that_does_not_trace_is_run_on_a_batch_if_there_is_one():
    x = torch.rand(2, 3, 8, 8)
    blind, _ = normkit.apply("group+ws", Untraceable(), lr=0.1, where=lambda path, layer: path != "inside.stays")
    seeing, optimizer = normkit.apply(
        "group+ws", Untraceable(), lr=0.1, batches=[x], where=lambda path, layer: path != "inside.stays"
    )
    traced = {"inside.inner", "inside.outer", "inside.side"}
    assert are_standardized(blind) == traced
    assert are_standardized(seeing) == traced | {"outside"}
    (effect,) = [e for e in normkit.describe(seeing, optimizer).effects if e.unit == "convolutions"]
    assert set(effect.done) == traced | {"outside"}
    assert effect.elements[1] == sum(
        p.numel() for m in seeing.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()
    )


@pytest.mark.parametrize("name", ["group", "none", "group+ws", "normalizer-free"])
def test_another_method_starts_from_the_weights_as_they_are_trained(name):
    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))

    plain = net()
    twice, once = copy.deepcopy(plain), normkit.apply(name, plain, lr=0.1)[0]
    twice, _ = normkit.apply("group+ws", twice, lr=0.1)
    twice, _ = normkit.apply(name, twice, lr=0.1)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(twice(x), once(x))
    assert are_standardized(twice) == are_standardized(once)


def test_an_error_after_standardization_was_undone_leaves_the_model_standardized():
    model, _ = normkit.apply("group+ws", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lr=0.1)
    x = torch.randn(2, 3, 6, 6)
    expected, keys = model(x), list(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        normkit.apply("group", model, lr=0.1, optimizer=lambda groups: 1 / 0)
    assert are_standardized(model) == {"0"}
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="batches is empty"):
        normkit.apply("group+ws", Untraceable(), lr=0.1, batches=[])


def test_a_layer_that_is_parametrized_already_is_put_back_on_an_error_and_its_copies_go_on():
    model, x = before_norms(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    copied, expected = copy.deepcopy(model), model(x)
    with pytest.raises(ZeroDivisionError):
        normkit.apply("group+ws", model, lr=0.1, optimizer=lambda groups: 1 / 0)
    assert torch.equal(model(x), expected)
    normkit.apply("group+ws", model, lr=0.1)
    assert not torch.allclose(model(x), expected)
    assert torch.equal(copied(x), expected)


def test_a_standardized_model_is_pickled_with_its_optimizer_and_both_train_on():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3, bias=False),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 5, 5).double()
    model(x)
    standardize_weights(model)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    again, its_optimizer = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps((model, optimizer)))))
    alone = copy.copy(model[0])
    for _ in range(2):
        assert step(again, its_optimizer) == step(model, optimizer)
    assert isinstance(again[0], nn.Conv2d)
    assert alone.parametrizations.weight.original is model[0].parametrizations.weight.original
    unparametrize_filters(again[0])
    assert type(again[0]) is nn.Conv2d
    assert torch.equal(again[0].weight, model[0].parametrizations.weight.original)


def test_a_layer_with_a_parametrization_of_its_owner_is_pickled_too():
    layer = standardize_weights(before_norms(nn.Conv2d(3, 4, 3)))[0]
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(again(x), layer(x))


def test_a_class_derived_from_a_standardized_layers_is_not_pickled_as_something_else():
    layer = standardize_weights(before_norms(nn.Conv2d(3, 4, 3)))[0]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises((pickle.PicklingError, AttributeError), match="Sharded"):
        pickle.dumps(layer)
