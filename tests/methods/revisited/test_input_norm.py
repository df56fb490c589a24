"""Online input normalization: batch statistics in training, exact data set statistics after a pass."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.methods.revisited.input_norm import with_input_norm
from normkit.surgery.affine import PadChannels
from tests.cases import rows

SHAPES = {"tabular": (7, 3), "sequence": (7, 3, 5), "image": (7, 3, 4, 5), "volume": (7, 3, 2, 3, 4)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_train_mode_normalizes_by_the_batch(shape, channel_dim):
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64).movedim(1, channel_dim)
    norm = normkit.InputNorm(3, channel_dim=channel_dim, dtype=torch.float64)
    flat = rows(x, channel_dim)
    expected = 0.58 * (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(rows(norm(x), channel_dim), expected, rtol=0, atol=1e-12)
    assert list(dict(norm.named_parameters())) == ["weight"]


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [17, 1, 22]])
def test_statistics_are_those_of_the_data_set_after_one_pass(sizes):
    torch.manual_seed(0)
    data = torch.rand(40, 3, 2, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])[:, None] + 5
    norm = normkit.InputNorm(3, dtype=torch.float64)
    for batch in data.split(sizes):
        norm(batch)
    assert torch.allclose(norm.running_mean, rows(data).mean(0), rtol=1e-12)
    assert torch.allclose(norm.running_var, rows(data).var(0, correction=0), rtol=1e-12)
    assert norm.rows_seen.item() == 80
    second_pass = copy.deepcopy(norm)
    second_pass(data)
    assert torch.allclose(second_pass.running_var, norm.running_var, rtol=1e-12)
    mean, var = rows(data).mean(0), rows(data).var(0, correction=0)
    expected = 0.58 * (data[:4] - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    assert torch.allclose(norm.eval()(data[:4]), expected, rtol=0, atol=1e-12)


def test_eval_and_a_poisoned_batch_leave_the_statistics_alone():
    norm = normkit.InputNorm(2)
    norm(torch.rand(8, 2))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))
    norm.eval()(torch.rand(8, 2))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_one_sample_in_train_mode_is_normalized_by_the_running_statistics():
    torch.manual_seed(0)
    norm = normkit.InputNorm(2, scale=1.0)
    data = torch.rand(100, 2)
    norm(data[:99])
    out = norm(data[99:])
    assert torch.allclose(out, (data[99:] - data.mean(0)) / (data.var(0, correction=0) + 1e-5).sqrt(), atol=1e-5)
    assert out.abs().min() > 1e-3  # batch statistics of one sample would make it 0


def test_first_sample_ever_gives_a_finite_output_and_gradient():
    norm = normkit.InputNorm(2)
    out = norm(torch.tensor([[3.0, 4.0]]))
    out.sum().backward()
    assert out.isfinite().all()
    assert norm.weight.grad.isfinite().all()


def test_gradients_in_train_mode_are_those_of_batch_normalization():
    torch.manual_seed(0)
    x = torch.rand(6, 3, 4, dtype=torch.float64, requires_grad=True)
    norm = normkit.InputNorm(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, x)


def test_bfloat16_input_keeps_fp32_statistics():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 8, 8).bfloat16()
    norm = normkit.InputNorm(3)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(norm.running_mean, x.float().mean((0, 2, 3)), atol=1e-6)


def test_compiled_equals_eager():
    torch.manual_seed(0)
    eager = normkit.InputNorm(3)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, backend="aot_eager")
    x = torch.rand(4, 3, 5)
    assert torch.allclose(eager(x), step(x))
    assert torch.allclose(eager.running_var, compiled.running_var)


def test_the_input_scale_cancels_where_the_first_convolution_is_normalized():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    after = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12)).double()
    one, other = (after(normkit.InputNorm(3, scale=s, dtype=torch.float64)(x)) for s in (0.58, 5.8))
    assert torch.allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), r"got torch.uint8 inputs.*x.float\(\) / 255"),
        (torch.zeros(2, 4), r"has 3 channels in dimension 1, got shape \(2, 4\)"),
        (torch.zeros(3), "has 3 channels"),
    ],
)
def test_bad_input_is_refused(x, message):
    norm = normkit.InputNorm(3)
    with pytest.raises(ValueError, match=message):
        norm(x)


def test_learning_rate_of_the_input_scale_follows_revisit_and_does_not_decay():
    model = normkit.revisit(nn.Sequential(normkit.InputNorm(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    group = next(g for g in normkit.param_groups(model, lr=1.0, weight_decay=0.1) if "scales" in g["name"])
    assert [p.shape for p in group["params"]] == [(3,), (4,)]
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.0)
    assert F.mse_loss(model[0].weight, torch.full((3,), 0.058)) < 1e-12


FOLDABLE = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "no padding, no bias": (nn.Conv2d(4, 6, 3, bias=False), (5, 4, 6, 7)),
    "zero padding": (nn.Conv2d(4, 6, 3, padding=(2, 1)), (5, 4, 6, 7)),
    "zero padding, grouped, strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 6, 7)),
    "depthwise": (nn.Conv1d(4, 8, 5, padding=4, dilation=2, groups=4), (5, 4, 9)),
    "same": (nn.Conv2d(4, 6, (3, 4), padding="same"), (5, 4, 6, 7)),
    "reflection": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 6, 7)),
    "volume": (nn.Conv3d(4, 2, 3, padding=1), (5, 4, 3, 4, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "shape"), FOLDABLE.values(), ids=FOLDABLE.keys())
def test_folding_into_the_first_layer_is_exact_at_the_border_too(layer, shape):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    norm = normkit.InputNorm(4, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.58, -2.0, 0.0, 30.0]))
    x = torch.rand(shape, dtype=torch.float64) * 3 + 7
    norm(x)
    expected = layer(norm.eval()(x))
    model = nn.Sequential(norm, layer)
    folded = normkit.fold(model)
    assert torch.allclose(folded(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-10)  # the model is as it was
    pads = isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode == "zeros" and layer.padding != (0, 0)
    assert type(folded[0]) is (PadChannels if pads else nn.Identity)


def test_putting_it_in_front_keeps_the_modes_of_the_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval())
    assert [m.training for m in with_input_norm(model).modules()] == [True, True, True, True, False]
    assert not any(m.training for m in with_input_norm(model.eval()).modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "narrow", [lambda dtype: normkit.InputNorm(3, dtype=dtype), lambda dtype: normkit.InputNorm(3).to(dtype)]
)
def test_a_half_precision_layer_keeps_fp32_statistics_in_every_mode(narrow, dtype):
    layer = narrow(dtype)
    wide = normkit.InputNorm(3)
    x = (torch.randn(8, 3, 4, 4) * 3 + 5).to(dtype)
    for inputs in (x, x[:1]):
        torch.testing.assert_close(layer(inputs).float(), wide(inputs.float()), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.eval()(x).float(), wide.eval()(x.float()), rtol=2e-2, atol=2e-2)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer.running_mean, wide.running_mean)


def test_the_number_of_channels_is_read_from_batches_of_inputs_and_labels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert with_input_norm(model, [(torch.randn(4, 3, 2, 2), torch.zeros(4))])[0].channels == 3
