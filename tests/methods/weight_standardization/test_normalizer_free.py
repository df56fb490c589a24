"""Normalizer-free networks: variance is kept, branches start at zero, gradients are clipped unit by unit."""

import math

import pytest
import torch
from torch import nn

import normkit
from normkit.inspection.branches import classifiers
from normkit.methods.weight_standardization.normalizer_free import (
    ScaledWeightStandardization,
    activation_gain,
    attach_clipping,
    clip_by_unit_,
    normalizer_free,
)
from normkit.study.models import build_model
from normkit.surgery._convert import convert


def resnet():
    torch.manual_seed(0)
    return convert(build_model("resnet20", input_shape=(3, 8, 8), classes=4), "none")


def parametrization(layer):
    return layer.parametrizations.weight[0]


def test_the_gain_of_relu_is_its_closed_form():
    assert activation_gain(torch.relu) == pytest.approx((2 / (1 - 1 / math.pi)) ** 0.5, rel=1e-6)
    assert activation_gain(lambda x: 3 * x + 1) == pytest.approx(1 / 3)


def test_a_deep_network_keeps_the_variance_at_initialization():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 128, 1)]
    for _ in range(10):
        layers += [nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular")]
    model = normalizer_free(nn.Sequential(*layers))
    for layer in model[::2]:
        nn.init.zeros_(layer.bias)
    y = model(torch.randn(8, 3, 8, 8))
    assert 0.5 < y.var(0).mean() < 1.5
    assert parametrization(model[0]).gamma == 1


def test_the_gain_is_that_of_the_activation_in_front():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Dropout(0.1), nn.Conv2d(4, 4, 1),
        nn.LeakyReLU(0.5), nn.Identity(), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    normalizer_free(model)
    gains = [parametrization(model[i]).gamma for i in (0, 3, 5, 8)]
    assert gains == pytest.approx([1, activation_gain(torch.relu), 1, activation_gain(nn.LeakyReLU(0.5))])


def test_every_block_of_a_resnet_starts_as_its_shortcut_and_its_scalar_trains():
    model = normalizer_free(resnet())
    x = torch.randn(2, 16, 8, 8).relu()
    for block in model[3:6]:  # the blocks of the first stage keep the shape
        assert torch.equal(block(x), x)
        assert parametrization(block.conv1).skip_gain is None
    assert parametrization(model[3].conv1).gamma == pytest.approx(activation_gain(torch.relu))
    assert parametrization(model[0]).gamma == 1
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(parametrization(block.conv2).skip_gain.grad != 0 for block in model[3:12])


def test_preactivation_branches_end_in_their_convolution():
    torch.manual_seed(0)
    model = normalizer_free(convert(build_model("wrn-10-1", input_shape=(3, 8, 8), classes=4), "none"))
    ends = [m for m in model.modules() if isinstance(m, ScaledWeightStandardization) and m.skip_gain is not None]
    assert len(ends) == 3


def reference_clip(weight, gradient, threshold, eps):
    """Unit by unit, in Python numbers."""
    clipped = gradient.clone()
    if weight.ndim < 2:
        weight, clipped = weight.reshape(1, -1), clipped.reshape(1, -1)
    for unit in range(len(weight)):
        limit = threshold * max(math.sqrt(sum(w * w for w in weight[unit].flatten().tolist())), eps)
        length = math.sqrt(sum(g * g for g in clipped[unit].flatten().tolist()))
        if length > limit:
            clipped[unit] *= limit / length
    return clipped.view_as(gradient)


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)])
def test_clipping_is_the_definition_unit_by_unit(shape):
    torch.manual_seed(0)
    for size in (0.0, 0.01, 1.0, 30.0):
        weight, gradient = torch.randn(shape).double(), size * torch.randn(shape).double()
        expected = reference_clip(weight, gradient, 0.5, 1e-3)
        clip_by_unit_(weight, gradient, 0.5)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    zero, gradient = torch.zeros(shape).double(), torch.ones(shape).double()
    clip_by_unit_(zero, gradient, 0.5)
    torch.testing.assert_close(gradient, reference_clip(zero, torch.ones(shape).double(), 0.5, 1e-3))


def test_the_step_clips_everything_but_the_classifier_and_transposed_filters_by_output():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(6 * 25, 5), nn.ReLU(),
        nn.Linear(5, 2),
    ).double()  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_clipping(model, optimizer, threshold=0.01)
    model(torch.randn(4, 3, 6, 6).double()).square().sum().mul(100).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = before[name] - parameter.detach()
        if name.startswith("6."):
            expected = grads[name]
        elif name == "2.weight":

            def filters(w):
                return torch.stack([w[2 * g : 2 * g + 2, o] for g in range(2) for o in range(3)])

            step, expected = filters(step), reference_clip(filters(before[name]), filters(grads[name]), 0.01, 1e-3)
        else:
            expected = reference_clip(before[name], grads[name], 0.01, 1e-3)
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-12)
    handle.remove()
    optimizer.step()  # with the clipped gradients, as they are


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_transposed_convolution_whose_weight_is_computed_trains(norm):
    model, optimizer = normkit.apply(
        "normalizer-free", nn.Sequential(norm(nn.ConvTranspose2d(3, 4, 2)), nn.BatchNorm2d(4)), lr=0.1
    )
    model(torch.randn(2, 3, 4, 4)).square().mean().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    model(torch.randn(2, 3, 4, 4))
    assert not torch.equal(model[0].weight, before)


def test_the_classifier_is_found_by_the_data_flow():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(-1))
    model[0].unused = nn.Linear(2, 2)
    assert classifiers(model) == [model[2]]
    assert classifiers(nn.Conv2d(1, 1, 1)) == []


def test_settings_out_of_range_are_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="threshold is 0"):
        attach_clipping(model, torch.optim.SGD(model.parameters(), lr=0.1), threshold=0)


def test_a_refused_setting_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = build_model("resnet20", input_shape=(3, 8, 8), classes=4).eval()
    x, keys = torch.randn(2, 3, 8, 8), list(model.state_dict())
    expected, kinds = model(x), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="threshold is -1"):
        normkit.apply("normalizer-free", model, lr=0.1, options={"threshold": -1.0})
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


def test_the_threshold_is_the_users():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))

    for threshold in (0.01, 0.1):
        net, optimizer = normkit.apply(
            "normalizer-free", build(), lr=1.0, momentum=0.0, options={"threshold": threshold}
        )
        weight = net[0].parametrizations.weight.original
        before = weight.detach().clone()
        (1e3 * net(torch.randn(2, 3, 1, 1)).square().sum()).backward()
        optimizer.step()
        moved = (weight.detach() - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        torch.testing.assert_close(moved, torch.full_like(moved, threshold), rtol=1e-3, atol=0)
