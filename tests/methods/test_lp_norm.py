"""l_p normalization against its definition, written out in float64."""

import math

import pytest
import torch
from torch import nn

import normkit
from normkit.methods.lp_norm import LpNorm1d, LpNorm2d
from tests.cases import norm_cases

LAYERS = norm_cases("LpNorm")
POWERS = [1, 2, math.inf]


def reference(x, p, weight, bias, eps):
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        channel = x[:, c]
        size = {1: channel.abs().mean(), 2: channel.square().mean().sqrt(), math.inf: channel.abs().max()}[p]
        out[:, c] = (channel - channel.mean()) / (size + eps) * weight[c] + bias[c]
    return out


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("layer", "_", "shape"), LAYERS)
def test_train_output_is_the_definition(layer, _, shape, p):
    torch.manual_seed(0)
    norm = layer(3, p, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    torch.testing.assert_close(norm(x), reference(x, p, norm.weight, norm.bias, norm.eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", POWERS)
def test_gradient_is_that_of_the_definition(p):
    torch.manual_seed(0)
    norm = LpNorm2d(3, p, dtype=torch.float64)
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(x)
    (ours,) = torch.autograd.grad((norm(x) * target).sum(), x)
    (theirs,) = torch.autograd.grad((reference(x, p, norm.weight, norm.bias, norm.eps) * target).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_evaluation_uses_running_averages(momentum):
    norm = LpNorm1d(1, 1, momentum=momentum)
    first, second = torch.tensor([[1.0], [3.0]]), torch.tensor([[-4.0], [0.0]])
    norm(first), norm(second)
    if momentum is None:
        mean, scale = 0.0, 2.0
    else:
        mean, scale = 0.9 * 0.2 - 0.1 * 2, 0.9 * (0.9 + 0.2) + 0.1 * 2
    out = norm.eval()(first)
    torch.testing.assert_close(out, (first - mean) / (scale + 1e-5))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("layer", "batchnorm", "shape"), LAYERS)
def test_conversion_keeps_the_evaluation_output(layer, batchnorm, shape, p):
    torch.manual_seed(0)
    norm = batchnorm(3, dtype=torch.float64)
    norm(torch.randn(shape, dtype=torch.float64) * 2 + 1)
    norm.eval()
    converted = layer.from_batchnorm(norm, p)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(converted(x), norm(x), rtol=1e-12, atol=1e-12)
    assert converted.weight is norm.weight
    assert not converted.training


def test_conversion_without_affine_and_statistics():
    norm = LpNorm2d.from_batchnorm(nn.BatchNorm2d(3, affine=False, track_running_stats=False), 1)
    assert not list(norm.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm.eval()(x), norm.train()(x))


def test_dead_channel_has_finite_gradients():
    norm = LpNorm1d(2, 2)
    x = torch.zeros(4, 2, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_keeps_its_dtype_and_statistics_do_not_overflow(dtype):
    norm = LpNorm1d(1, 2)
    x = torch.full((4096, 1), 200.0, dtype=dtype)
    x[::2] = -200.0
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.abs().float(), torch.ones(4096, 1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_an_empty_batch_changes_nothing(p):
    norm = LpNorm2d(3, p)
    norm(torch.randn(4, 3, 2, 2))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.randn(0, 3, 2, 2)).sum().backward()
    assert torch.equal(norm.weight.grad, torch.zeros(3))
    torch.testing.assert_close((norm.running_mean, norm.running_var), before, rtol=0, atol=0)


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match="one value per channel"):
        LpNorm2d(3)(torch.randn(1, 3, 1, 1))


def test_other_powers_and_shapes_are_refused():
    with pytest.raises(ValueError, match="p is 3"):
        LpNorm2d(3, 3)
    with pytest.raises(ValueError, match="4-d"):
        LpNorm2d(3)(torch.randn(2, 3))


@pytest.mark.parametrize(("name", "p"), [("l1", 1), ("l2", 2), ("linf", math.inf)])
def test_convert_and_recipe_replace_batch_normalization_and_revert_puts_it_back(name, p):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4), nn.BatchNorm1d(4))
    x = torch.randn(5, 3, 4, 4)
    expected = model.eval()(x)
    model, optimizer = normkit.apply(name, model, lr=0.1)
    assert isinstance(model[1], LpNorm2d)
    assert isinstance(model[4], LpNorm1d)
    assert model[1].p == p
    torch.testing.assert_close(model(x), expected)
    assert normkit.convert(model, name)[1] is model[1]
    model.train()(x).square().sum().backward()
    optimizer.step()
    assert isinstance(normkit.revert(model)[1], nn.BatchNorm2d)


def test_scale_and_shift_are_grouped_as_those_of_a_norm():
    names = [group["name"] for group in normkit.param_groups(LpNorm1d(3), lr=0.1, weight_decay=0.1)]
    assert names == ["norm-scales", "norm-shifts"]
