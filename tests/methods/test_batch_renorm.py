import math

import pytest
import torch
from torch import nn

import normkit
from normkit import BatchRenorm1d, BatchRenorm2d
from normkit.functional import renorm_correction
from tests.cases import norm_cases

CASES = [(cls, shape) for cls, _, shape in norm_cases("BatchRenorm")]
SCHEDULE = {"warmup": 5, "r_steps": 25, "d_steps": 20}


class Reference:
    """The paper's algorithm, one line at a time, in float64; the running averages start as plain averages."""

    def __init__(self, features, momentum, eps=1e-5):
        self.mean, self.std, self.t = torch.zeros(features).double(), torch.ones(features).double(), 0
        self.std, self.momentum, self.eps = (1 + eps) ** 0.5 * self.std, momentum, eps

    def __call__(self, x, weight, bias):
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        std = ((rows - mean).square().mean(0) + self.eps).sqrt()
        r_max = 1 + 2 * min(1, max(0, (self.t - 5) / 20))
        d_max = 5 * min(1, max(0, (self.t - 5) / 15))
        r = (std / self.std).detach().clip(1 / r_max, r_max)
        d = ((mean - self.mean) / self.std).detach().clip(-d_max, d_max)
        out = (rows - mean) / std * r + d
        self.t += 1
        rate = max(self.momentum, 1 / self.t)
        self.mean = self.mean + rate * (mean.detach() - self.mean)
        self.std = self.std + rate * (std.detach() - self.std)
        out = out * weight + bias
        return out.reshape(*x.movedim(1, -1).shape).movedim(-1, 1)


@pytest.mark.parametrize(("cls", "shape"), CASES)
@pytest.mark.parametrize("affine", [True, False])
def test_outputs_gradients_and_statistics_follow_the_paper_through_the_whole_schedule(cls, shape, affine):
    torch.manual_seed(0)
    layer = cls(3, momentum=0.1, affine=affine, dtype=torch.float64, **SCHEDULE)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    reference = Reference(3, momentum=0.1)
    for step in range(40):
        x = (torch.randn(shape).double() * (1 + step / 10) + step / 20).requires_grad_()
        z = x.detach().clone().requires_grad_()
        weight = layer.weight.detach().clone().requires_grad_() if affine else torch.ones(3).double()
        bias = layer.bias.detach().clone().requires_grad_() if affine else torch.zeros(3).double()
        seed = torch.randn(shape).double()
        y, expected = layer(x), reference(z, weight, bias)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        layer.zero_grad()
        y.backward(seed)
        expected.backward(seed)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-10)
        if affine:
            torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.running_mean, reference.mean)
        torch.testing.assert_close((layer.running_var + layer.eps).sqrt(), reference.std)
    shape = [1, 3] + [1] * (len(shape) - 2)
    normal = (x - reference.mean.view(shape)) / reference.std.view(shape)
    expected = normal * weight.view(shape) + bias.view(shape)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-10, atol=1e-10)


def test_in_the_warmup_it_is_batch_normalization():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(BatchRenorm2d(3)(x), nn.BatchNorm2d(3)(x))


def test_where_nothing_is_clipped_training_normalises_by_the_running_statistics():
    layer = BatchRenorm2d(3, momentum=1e-6, r_max=1e6, d_max=1e6, warmup=0, r_steps=0, d_steps=0)
    layer.num_batches_tracked.fill_(10**7)
    x = 5 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 7
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=1e-4, atol=1e-4)


def test_the_correction_has_no_gradient_and_is_clipped():
    x = torch.tensor([[0.0], [200.0]], requires_grad=True)
    c = renorm_correction(x, torch.tensor([0.0]), torch.tensor([1.0]), r_max=3.0, d_max=5.0)
    assert (c.r.item(), c.d.item()) == (3.0, 5.0)
    assert not any(t.requires_grad for t in c)


def test_a_checkpoint_goes_on_in_the_middle_of_the_schedule():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 2, 2) * 3 + 1 for _ in range(20)]
    whole, first, second = (BatchRenorm2d(3, **SCHEDULE) for _ in range(3))
    expected = [whole(x) for x in batches][-1]
    for x in batches[:10]:
        first(x)
    second.load_state_dict(first.state_dict())
    assert torch.equal([second(x) for x in batches[10:]][-1], expected)


@pytest.mark.parametrize(("cls", "shape"), [(BatchRenorm1d, (1, 3)), (BatchRenorm2d, (1, 3, 1, 1))])
def test_one_value_per_channel_is_refused_in_train_mode_and_fine_in_eval_mode(cls, shape):
    layer = cls(3)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.randn(shape))
    assert layer.eval()(torch.randn(shape)).isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"r_max": 0.5}, {"d_max": -1.0}, {"momentum": 0.0}, {"warmup": 50, "r_steps": 20}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings)))):
        BatchRenorm2d(3, **settings)


def test_low_precision_inputs_keep_wide_statistics():
    layer = BatchRenorm2d(3)
    x = torch.randn(4, 3, 8, 8).bfloat16()
    y = layer(x)
    assert (y.dtype, layer.running_mean.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(layer.running_mean, x.float().mean((0, 2, 3)))


def test_the_recipe_trains_at_batch_size_one_on_feature_maps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    model, optimizer = normkit.apply("batch-renorm", net, lr=0.01)
    x = torch.randn(8, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for step in range(160):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[step % 8 :][:1]), y[step % 8 :][:1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert isinstance(model[1], BatchRenorm2d)
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


@pytest.mark.parametrize("bad", [torch.full((4, 3), math.nan), torch.full((4, 3), math.inf), torch.zeros(0, 3)])
def test_a_batch_that_is_empty_or_not_finite_does_not_poison_the_statistics(bad):
    layer = BatchRenorm1d(3)
    layer(torch.randn(8, 3))
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(bad).sum().backward()
    assert layer.weight.grad.isfinite().all() == (bad.numel() == 0)
    torch.testing.assert_close((layer.running_mean, layer.running_var), before, rtol=1e-6, atol=1e-6)


def test_torchs_update_bn_averages_all_batches():
    layer = BatchRenorm1d(3)
    batches = list(torch.randn(5, 8, 3) + 1)
    torch.optim.swa_utils.update_bn(batches, layer)
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(0))
