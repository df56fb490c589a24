"""Online Normalization against its equations, one sample after the other in float64, and its exactness under splitting."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkit.methods.online import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d, affine_recurrence, layer_scaling

SHAPES = [
    (OnlineNorm1d, (6, 3)),
    (OnlineNorm1d, (1, 3)),
    (OnlineNorm1d, (5, 3, 4)),
    (OnlineNorm2d, (1, 3, 4, 2)),
    (OnlineNorm2d, (7, 3, 4, 2)),
    (OnlineNorm3d, (3, 3, 2, 2, 2)),
]
DECAYS = {"forward_decay": 0.9, "backward_decay": 0.7}


class Reference:
    """The equations, sample by sample and channel by channel, gradients written out by hand."""

    def __init__(self, channels, a, b, eps=1e-5):
        self.a, self.b, self.eps = a, b, eps
        self.mu, self.var = [0.0] * channels, [1.0] * channels
        self.error_y, self.error_1 = [0.0] * channels, [0.0] * channels

    def forward(self, x, weight, bias):
        self.weight, self.y, self.sigma = weight, torch.empty_like(x), torch.empty(x.shape[:2]).double()
        z, self.rms = torch.empty_like(x), []
        for t in range(len(x)):
            for c in range(x.shape[1]):
                sample = x[t, c]
                self.sigma[t, c] = (self.var[c] + self.eps) ** 0.5
                self.y[t, c] = (sample - self.mu[c]) / self.sigma[t, c]
                m, s = sample.mean(), sample.var(correction=0) if sample.numel() > 1 else 0.0
                deviation = m - self.mu[c]
                self.var[c] = self.a * self.var[c] + (1 - self.a) * s + self.a * (1 - self.a) * deviation**2
                self.mu[c] = self.a * self.mu[c] + (1 - self.a) * m
                z[t, c] = self.y[t, c] * weight[c] + bias[c]
            self.rms.append((z[t].square().mean() + self.eps).sqrt())
            z[t] /= self.rms[t]
        self.z = z
        return z

    def backward(self, grad):
        dx, dweight, dbias = torch.empty_like(grad), torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        for t in range(len(grad)):
            scaled = (grad[t] - self.z[t] * (grad[t] * self.z[t]).mean()) / self.rms[t]
            for c in range(grad.shape[1]):
                y = self.y[t, c]
                dweight[c] += (scaled[c] * y).sum()
                dbias[c] += scaled[c].sum()
                g = scaled[c] * self.weight[c] - (1 - self.b) * self.error_y[c] * y
                self.error_y[c] += (g * y).mean()
                dx[t, c] = g / self.sigma[t, c] - (1 - self.b) * self.error_1[c]
                self.error_1[c] += dx[t, c].mean()
        return dx, dweight, dbias


@pytest.mark.parametrize(("cls", "shape"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_outputs_gradients_and_state_follow_the_equations_over_many_steps(cls, shape, affine):
    torch.manual_seed(0)
    layer = cls(3, affine=affine, dtype=torch.float64, **DECAYS)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    weight = layer.weight.detach() if affine else torch.ones(3).double()
    bias = layer.bias.detach() if affine else torch.zeros(3).double()
    reference = Reference(3, *DECAYS.values())
    for step in range(30):
        x = (torch.randn(shape).double() * (1 + step / 20) + step / 20).requires_grad_()
        seed = torch.randn(shape).double()
        y = layer(x)
        torch.testing.assert_close(y, reference.forward(x.detach(), weight, bias), rtol=1e-11, atol=1e-11)
        layer.zero_grad()
        y.backward(seed)
        dx, dweight, dbias = reference.backward(seed)
        torch.testing.assert_close(x.grad, dx, rtol=1e-10, atol=1e-10)
        if affine:
            torch.testing.assert_close(layer.weight.grad, dweight, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(layer.bias.grad, dbias, rtol=1e-10, atol=1e-10)
        state = {"running_mean": reference.mu, "running_var": reference.var}
        state |= {"error_y": reference.error_y, "error_1": reference.error_1}
        for name, expected in state.items():
            torch.testing.assert_close(getattr(layer, name), torch.tensor(expected).double(), rtol=1e-10, atol=1e-10)


def test_a_batch_is_its_samples_one_after_the_other():
    torch.manual_seed(0)
    whole = OnlineNorm2d(3, dtype=torch.float64, **DECAYS)
    split = copy.deepcopy(whole)
    x, seed = torch.randn(2, 9, 3, 4, 2, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = whole(a)
    y.backward(seed)
    for start in (0, 1, 5):
        stop = {0: 1, 1: 5, 5: 9}[start]
        z = split(b[start:stop])
        torch.testing.assert_close(z, y[start:stop], rtol=1e-12, atol=1e-12)
        z.backward(seed[start:stop])
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.weight.grad, whole.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(split.named_buffers()), dict(whole.named_buffers()), rtol=1e-12, atol=1e-12)


def test_over_time_the_gradient_has_no_part_along_one_and_along_the_normalized_values():
    torch.manual_seed(0)
    layer = OnlineNorm1d(2, affine=False, dtype=torch.float64)
    x = torch.randn(4000, 2, dtype=torch.float64, requires_grad=True)
    y = layer._normalize(x)
    (grad,) = torch.autograd.grad(y, x, 1 + 2 * y.detach() + torch.randn(4000, 2, dtype=torch.float64))
    late, values = grad[1000:], y.detach()[1000:]
    assert (late.mean(0).abs() < 0.05).all()
    assert ((late * values).mean(0).abs() < 0.05).all()


def test_the_scan_is_the_recurrence():
    torch.manual_seed(0)
    for steps in (0, 1, 2, 7, 64):
        factor, increment, state = torch.randn(steps, 3), torch.randn(steps, 3), torch.randn(3)
        states = affine_recurrence(factor, increment, state)
        assert len(states) == steps + 1
        for t in range(steps):
            torch.testing.assert_close(states[t], state, rtol=1e-4, atol=1e-4)
            state = factor[t] * state + increment[t]
        torch.testing.assert_close(states[-1], state, rtol=1e-4, atol=1e-4)


def test_layer_scaling_is_rms_normalization_over_a_whole_sample():
    y = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(layer_scaling(y), F.rms_norm(y, y.shape[1:], eps=1e-5), rtol=1e-12, atol=1e-12)


def test_evaluation_uses_the_running_statistics_and_changes_nothing():
    norm = nn.BatchNorm2d(3)
    for _ in range(3):
        norm(torch.randn(8, 3, 4, 4) * 2 + 1)
    layer = OnlineNorm2d.from_batchnorm(norm).eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(layer(x), F.rms_norm(norm.eval()(x), (3, 4, 4), eps=1e-5))
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert layer.weight is norm.weight


def test_a_checkpoint_goes_on_exactly():
    torch.manual_seed(0)
    first, second = OnlineNorm2d(3, **DECAYS), OnlineNorm2d(3, **DECAYS)
    seed = torch.randn(4, 3, 2, 2)
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2, requires_grad=True)
        first(x).backward(seed)
    second.load_state_dict(first.state_dict())
    a = torch.randn(4, 3, 2, 2, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    first(a).backward(seed)
    second(b).backward(seed)
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_keep_wide_statistics_and_their_layout(dtype):
    layer = OnlineNorm2d(3).to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert {b.dtype for b in layer.buffers()} == {torch.float32}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_or_a_gradient_that_is_not_finite_leaves_no_trace(bad):
    torch.manual_seed(0)
    layer = OnlineNorm1d(2)
    layer(torch.randn(4, 2, requires_grad=True)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.full((3, 2), bad))
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    x = torch.randn(3, 2, requires_grad=True)
    layer(x).backward(torch.full((3, 2), bad))
    assert not x.grad.isfinite().any()
    assert torch.equal(layer.error_y, before["error_y"])
    assert torch.equal(layer.error_1, before["error_1"])


def test_an_empty_batch_passes():
    assert OnlineNorm1d(3)(torch.zeros(0, 3)).shape == (0, 3)


def test_wrong_shapes_and_decays_are_refused():
    with pytest.raises(ValueError, match="4-d"):
        OnlineNorm2d(3)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="forward_decay is 1"):
        OnlineNorm2d(3, forward_decay=1.0)
    with pytest.raises(ValueError, match=r"backward_decay is -0\.1"):
        OnlineNorm2d(3, backward_decay=-0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it where a graph breaks
def test_a_compiled_model_trains_as_the_eager_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), OnlineNorm1d(3), nn.ReLU())
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(5, 4)
        model(x).square().sum().backward()
        compiled(x).square().sum().backward()
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(dict(model.named_buffers()), dict(copied.named_buffers()))
