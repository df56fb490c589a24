import copy
import logging

import pytest
import torch
from torch import nn

import normkit
from normkit.methods.filter_response import ThresholdedLinearUnit, filter_response, threshold_relus
from tests.cases import MODELS, norm_cases


class SharedReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return torch.relu(self.norm2(self.second(self.relu(self.norm1(self.relu(self.first(x)))))))


@pytest.mark.parametrize(("layer", "_", "shape"), norm_cases("FilterResponseNorm"))
def test_each_channel_of_each_sample_is_divided_by_its_root_mean_square(layer, _, shape):
    norm, x = layer(3, eps=1e-3, learn_eps=False, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) + 2
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -3.0]))
    expected = torch.empty_like(x)
    for n in range(shape[0]):
        for c in range(3):
            square = (x[n, c] ** 2).mean() if x.ndim > 2 else x[n, c] ** 2
            expected[n, c] = norm.weight[c] * x[n, c] / (square + 1e-3).sqrt() + norm.bias[c]
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(norm.eval()(x), norm.train()(x))


def test_a_sample_does_not_depend_on_its_batch_and_its_scale_does_not_matter():
    norm, x = normkit.FilterResponseNorm2d(3, eps=0.0, dtype=torch.float64), torch.randn(4, 3, 5, 5).double()
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm(7 * x), norm(x), rtol=1e-12, atol=1e-12)


def test_the_gradients_are_those_of_the_equation():
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    eps = torch.tensor(1e-2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(filter_response, (x, eps))


def test_a_single_position_learns_its_eps():
    norm = normkit.FilterResponseNorm1d(3, dtype=torch.float64)
    x = torch.tensor([[0.01, -1.0, 0.0]], dtype=torch.float64)
    expected = x / (x**2 + 1e-6 + 1e-4).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)
    norm(x).sum().backward()
    assert norm.epsilon.grad.abs() > 0
    assert normkit.FilterResponseNorm2d(3).epsilon is None


def test_half_precision_squares_do_not_overflow():
    x = torch.full((1, 1, 2, 2), 1000.0, dtype=torch.float16)
    assert torch.equal(filter_response(x), torch.ones_like(x))


def test_the_unit_starts_as_a_relu_and_learns_a_threshold_per_channel():
    unit, x = ThresholdedLinearUnit(2), torch.tensor([[[-1.0, 2.0], [0.5, -3.0]]])
    assert torch.equal(unit(x), x.relu())
    with torch.no_grad():
        unit.threshold.copy_(torch.tensor([-0.5, 1.0]))
    assert unit(x).tolist() == [[[-0.5, 2.0], [1.0, 1.0]]]
    unit(x).sum().backward()
    assert unit.threshold.grad.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "units"), [("images", 2), ("residual", 2), ("mlp", 1), ("sequences", 0), ("volumes", 1)]
)
def test_the_recipe_replaces_every_relu_that_is_a_module_of_its_own(name, units):
    model, optimizer = normkit.apply("filter-response", MODELS[name].model(), lr=0.1)
    found = [m for m in model.modules() if isinstance(m, ThresholdedLinearUnit)]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == units
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert {unit.threshold for unit in found} <= held


def test_thresholds_do_not_change_the_function_at_first():
    converted = normkit.convert(MODELS["residual"].model(), "filter-response")
    x = MODELS["residual"].batches()[0][0]
    assert torch.equal(threshold_relus(copy.deepcopy(converted))(x), converted(x))


def test_relus_that_are_functions_or_shared_stay_and_are_named(caplog):
    with caplog.at_level(logging.WARNING, "normkit"):
        model, _ = normkit.apply("filter-response", SharedReLU(), lr=0.1)
    assert type(model.relu) is nn.ReLU
    assert "2 ReLUs keep their threshold of 0" in caplog.text
    assert "relu behind norm1, a function behind norm2" in caplog.text


def test_revert_makes_relus_and_batch_normalizations_again():
    plain = MODELS["residual"].model()
    model, optimizer = normkit.apply("filter-response", MODELS["residual"].model(), lr=0.1)
    model = normkit.revert(model, optimizer=optimizer)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    x = MODELS["residual"].batches()[0][0]
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())


def test_a_filter_before_it_is_scale_invariant_unless_it_has_a_bias():
    def invariant(bias):
        model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), normkit.FilterResponseNorm2d(3))
        return normkit.scale_invariance(model)["0.weight"]

    assert invariant(False).invariant
    assert "leaves the bias" in invariant(True).reason


def test_fold_leaves_it_with_a_reason():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), normkit.FilterResponseNorm2d(3)).eval()
    with pytest.warns(UserWarning, match="it normalises by the statistics of its own input"):
        normkit.fold(model)


def test_a_wrong_shape_is_an_error_that_says_which():
    with pytest.raises(ValueError, match=r"expects 4-d input with 3 channels, got shape \(2, 4, 5, 5\)"):
        normkit.FilterResponseNorm2d(3)(torch.zeros(2, 4, 5, 5))
