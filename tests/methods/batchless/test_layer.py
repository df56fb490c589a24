"""Batchless normalization: the layer against its definition, in float64."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import normkit
from normkit.functional import gaussian_nll_gradients
from normkit.inspection.counting import Collector
from normkit.methods.batchless.fit import LikelihoodParameters
from normkit.methods.batchless.functions import moments_about
from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d
from normkit.methods.batchless.training import collect
from normkit.moments import observe
from tests.cases import norm_cases

CASES = norm_cases("BatchlessNorm")


def layer(cls, *, seed=0, **options):
    torch.manual_seed(seed)
    norm = cls(3, dtype=torch.float64, **options)
    norm.set_statistics(torch.randn(3).double(), (torch.rand(3).double() + 0.5).square())
    if norm.affine:
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    return norm


def counting(norm):
    norm.set_collector(Collector("the test", "collect"))
    return norm


def over_rows(x):
    """All dimensions but the channels."""
    return [d for d in range(x.dim()) if d != 1]


def two_path(norm, x):
    """The layer as the paper writes it: (output, likelihood per channel), with autograd through mu and rho."""
    shape = (-1, *[1] * (x.dim() - 2))
    mean = norm.running_mean.detach().clone().requires_grad_()
    rho = {"log": norm.sigma.log(), "abs": norm.sigma, "inv": 1 / norm.sigma}[norm.scale].requires_grad_()
    sigma = {"log": rho.exp(), "abs": rho.abs(), "inv": 1 / rho.abs()}[norm.scale]
    n = (x - mean.detach().view(shape)) / sigma.detach().view(shape)
    y = n * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else n
    fit = (x.detach() - mean.view(shape)) / sigma.view(shape)
    nll = sigma.log() + fit.square().mean(over_rows(x)) / 2
    return y, nll.sum(), mean, rho


@pytest.mark.parametrize(("scale", "shared"), [("log", False), ("abs", False), ("inv", False), ("inv", True)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("cls", "_", "shape"), CASES)
def test_plain_gradients_are_those_of_the_two_path_loss(cls, _, shape, affine, scale, shared):
    norm = counting(layer(cls, affine=affine, scale=scale, shared=shared, gradient="plain", eps=0.0))
    x = (torch.randn(shape).double() * 2 + 1).requires_grad_()
    coefficients = torch.randn(shape).double()
    trained = [x, *(p for p in norm.parameters() if p.requires_grad)]
    y, nll, mean, rho = two_path(norm, x)
    *expected, d_mean, d_rho = torch.autograd.grad((y * coefficients).sum() + nll, [*trained, mean, rho])
    if shared:  # one mu and one rho, and the mean over the channels, too
        d_mean, d_rho = (d.mean().expand(3) for d in (d_mean, d_rho))
    out = norm(x)
    torch.testing.assert_close(out, y, rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad((out * coefficients).sum(), trained)
    plain = LikelihoodParameters(norm)
    plain.before(collect([norm])[0][0].moments[0])
    fitted = [p.grad for p in plain.parameters()]
    for got, want in zip([*actual, *fitted], [*expected, d_mean, d_rho], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mean", "variance"])
def test_a_small_step_follows_the_natural_gradient(name):
    norm = counting(layer(BatchlessNorm2d))
    x = torch.randn(4, 3, 5, 2).double() * 2 + 1
    mean, sigma = norm.running_mean.clone(), norm.sigma
    d_mean, d_rho = gaussian_nll_gradients(observe(x, 1), mean, sigma, eps=norm.eps)
    norm(x).sum().backward()
    collect([norm])[0][0].natural_gradient_step(1e-6)
    eta = 1e-6 * 4 / (4 + 6)  # of 4 instances
    got, want = {
        "mean": ((mean - norm.running_mean) / eta, d_mean),
        "variance": ((sigma.log() - norm.sigma.log()) / eta, d_rho),
    }[name]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_three_instances_are_three_whatever_their_lengths_and_order():
    torch.manual_seed(0)
    short, long = torch.randn(2, 3, 4).double(), torch.randn(1, 3, 9).double()
    rows = torch.cat([part.transpose(0, 1).flatten(1) for part in (short, long)], 1)
    for parts in ((short, long), (long, short)):
        norm = counting(BatchlessNorm1d(3, affine=False, dtype=torch.float64))
        for part in parts:
            norm(part)  # without affine raw inputs count at once
        collect([norm])[0][0].natural_gradient_step(0.9)
        torch.testing.assert_close(norm.running_mean.data, 0.9 * 3 / (3 + 6) * rows.mean(1), rtol=1e-12, atol=1e-12)


def test_natural_gradient_is_the_plain_one_divided_by_the_fisher_information():
    torch.manual_seed(0)
    x, mean, sigma = torch.randn(50, 3).double() * 3, torch.randn(3).double(), torch.rand(3).double() + 0.1
    plain = gaussian_nll_gradients(observe(x), mean, sigma, gradient="plain")
    natural = gaussian_nll_gradients(observe(x), mean, sigma)
    torch.testing.assert_close(natural[0], plain[0] * sigma.square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(natural[1], plain[1] / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"projected": True}, {"scale": "abs"}])
@pytest.mark.parametrize(("cls", "_", "shape"), CASES)
def test_train_and_eval_mode_are_the_same_function(cls, _, shape, options):
    norm = layer(cls, **options)
    x = torch.randn(shape).double().requires_grad_()
    torch.testing.assert_close(norm.train()(x), norm.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("cls", "bn_cls", "shape"), CASES)
def test_batch_normalization_goes_there_and_back(cls, bn_cls, shape, affine):
    torch.manual_seed(0)
    bn = bn_cls(3, affine=affine, dtype=torch.float64)
    x = torch.randn(shape).double() * 2 + 1
    bn(x)
    bn.eval()
    norm = cls.from_batchnorm(bn)
    assert not norm.training
    torch.testing.assert_close(norm(x), bn(x), rtol=1e-12, atol=1e-12)
    back = normkit.convert(norm, "batch")
    assert type(back) is bn_cls
    for name, tensor in back.state_dict().items():
        if name != "num_batches_tracked":
            assert torch.equal(tensor, bn.state_dict()[name])
    assert torch.equal(back(x), bn(x))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"projected": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_models_keep_wide_statistics(dtype, options):
    norm = BatchlessNorm2d(3, **options).to(dtype)
    statistics = [norm.running_mean, norm.running_var, *norm.buffers()]
    assert {statistic.dtype for statistic in statistics} == {torch.float32}
    x = torch.randn(4, 3, 5, 5, dtype=dtype, requires_grad=True)
    y = norm(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_channels_last_memory_and_channels_last_inputs_give_the_same(options):
    results = []
    for arrange, feature_dim in ((lambda t: t, 1), (lambda t: t.to(memory_format=torch.channels_last), 1)):
        results.append(step_once(arrange, feature_dim, options))
    results.append(step_once(lambda t: t.permute(0, 2, 3, 1).contiguous(), -1, options))
    results[2] = [t.permute(0, 3, 1, 2) if t.dim() == 4 else t for t in results[2]]
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def step_once(arrange, feature_dim, options):
    norm = layer(BatchlessNorm2d, feature_dim=feature_dim, **options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 5, 2, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(4, 3, 5, 2, generator=generator, dtype=torch.float64)
    x = arrange(x).requires_grad_()
    y = norm(x)
    (y * arrange(coefficients)).sum().backward()
    collect([norm])[0][0].natural_gradient_step(0.3)
    return [
        y.detach(),
        x.grad,
        norm.running_mean,
        norm.running_var,
        *(p.grad for p in (norm.weight, norm.bias) if p is not None),
    ]


def test_masked_rows_are_normalized_but_not_counted():
    norm = counting(layer(BatchlessNorm1d, feature_dim=-1))
    x = torch.randn(2, 4, 3).double().requires_grad_()
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    y = norm(x, mask)
    torch.testing.assert_close(y, norm.eval()(x), rtol=0, atol=0)
    y.sum().backward()
    (moments,) = collect([norm])[0][0].moments
    for got, want in zip(moments, observe(x[mask]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def saved_activations(norm, x):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t.numel()} if t.numel() >= x.numel() else {}) or t, lambda t: t
    ):
        norm(x)
    return sum(saved.values()) / x.numel()


@pytest.mark.parametrize("options", [{}, {"projected": True}])
def test_saves_no_more_than_batch_normalization_and_nothing_without_affine(options):
    x = torch.randn(8, 3, 6, 6, requires_grad=True)
    assert saved_activations(BatchlessNorm2d(3, **options), x) <= saved_activations(nn.BatchNorm2d(3), x) == 1
    assert saved_activations(BatchlessNorm2d(3, affine=False), x) == 0


def test_loads_the_state_of_the_batch_normalization_it_replaced():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    bn(x)
    norm = BatchlessNorm2d(3)
    norm.load_state_dict(bn.state_dict())
    torch.testing.assert_close(norm(x), bn.eval()(x))


@pytest.mark.parametrize(
    ("cls", "shape"), [(BatchlessNorm1d, (2, 3, 4, 5)), (BatchlessNorm2d, (2, 3)), (BatchlessNorm2d, (2, 4, 3, 3))]
)
def test_wrong_inputs_are_named(cls, shape):
    with pytest.raises(ValueError, match="does not fit"):
        cls(3)(torch.randn(shape))


@pytest.mark.parametrize("option", [{"scale": "exp"}, {"gradient": "exact"}, {"feature_dim": 2}])
def test_unknown_options_are_named(option):
    with pytest.raises(ValueError, match=str(next(iter(option)))):
        BatchlessNorm2d(3, **option)


@pytest.mark.parametrize("scale", ["log", "abs", "inv"])
@pytest.mark.parametrize("spread", [1e-2, 1.0, 1e2])
def test_tracks_a_drifting_gaussian_of_any_scale(spread, scale):
    torch.manual_seed(0)
    norm = BatchlessNorm1d(4, scale=scale, eps=0.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    normkit.attach(norm, optimizer)
    for step in range(400):
        center = spread * step / 200
        optimizer.zero_grad()
        norm(torch.randn(64, 4).double() * spread + center).sum().mul(0).backward()
        optimizer.step()
    assert norm.sigma.div(spread).log().abs().max() < 0.1
    lag = spread / 200 / 0.064  # a running mean of weight 0.07 * 64 / 70 trails a linear drift by the inverse, in steps
    assert (norm.running_mean - center + lag).abs().max() < 0.2 * spread
    assert abs(norm.mismatch) < 0.1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_far_from_zero_lose_no_digits_once_mu_is_there(memory_format):
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 9, 9) + 1e4).contiguous(memory_format=memory_format)
    mean, variance = torch.full((3,), 1e4 + 0.5), torch.full((3,), 1.5)
    want, got = observe(x.double(), 1), moments_about(x, mean, variance, 1e-5)
    torch.testing.assert_close(got.mean.double(), want.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(got.variance.double(), want.variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gradient", ["natural", "plain"])
def test_shared_statistics_are_those_of_all_channels_together(gradient):
    torch.manual_seed(0)
    x = (
        torch.randn(64, 3, 4).double() * torch.tensor([0.5, 1.0, 2.0])[:, None]
        + torch.tensor([-1.0, 0.0, 4.0])[:, None]
    )
    norm = BatchlessNorm1d(3, shared=True, gradient=gradient, eps=0.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.5)
    normkit.attach(norm, optimizer)
    for _ in range(600):
        norm(x).sum().mul(0).backward()
        optimizer.step()
    for got, want in ((norm.running_mean, x.mean()), (norm.running_var, x.var(correction=0))):
        torch.testing.assert_close(got.data, want.expand(3), rtol=1e-6, atol=1e-6)
    other = BatchlessNorm1d(3, shared=True, eps=0.0, dtype=torch.float64)
    normkit.initialize(other, [x])
    torch.testing.assert_close(other.running_var.data, x.var(correction=0).expand(3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_fitting_anew_can_keep_the_function(shared):
    torch.manual_seed(0)
    norms = layer(BatchlessNorm1d, seed=1, shared=shared), layer(BatchlessNorm1d, seed=2, shared=shared)
    model = nn.Sequential(norms[0], nn.Linear(3, 3).double(), nn.Tanh(), norms[1])
    x = torch.randn(50, 3).double() * 4 + 2
    before = model(x)
    normkit.initialize(model, [x], keep_function=True)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    normal = (x - norms[0].running_mean) / norms[0].sigma
    assert (normal.mean().abs() if shared else normal.mean(0).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="keep_function"):
        normkit.initialize(layer(BatchlessNorm1d, affine=False), [x], keep_function=True)


def test_mismatch_is_zero_at_a_perfect_fit_and_grows_with_the_misfit():
    x = torch.randn(1000, 2).double()
    var, mean = torch.var_mean(x, 0, correction=0)
    for factor, expected in ((1.0, 0.0), (0.5, 1.5), (2.0, -0.375)):
        norm = BatchlessNorm1d(2, dtype=torch.float64, eps=0.0)
        norm.set_statistics(mean, factor**2 * var)
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        normkit.attach(norm, optimizer)
        assert norm.mismatch is None
        norm(x).sum().backward()
        optimizer.step()
        assert math.isclose(norm.mismatch.item(), expected, abs_tol=1e-9)


def test_a_dead_channel_ends_at_eps_and_stays_finite():
    norm = BatchlessNorm1d(2, dtype=torch.float64, eps=1e-4)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    normkit.attach(norm, optimizer, rate=0.5)
    x = torch.randn(32, 2).double()
    x[:, 0] = 3.0
    for _ in range(60):
        optimizer.zero_grad()
        norm(x).sum().backward()
        optimizer.step()
    torch.testing.assert_close(norm.sigma[0].item(), 1e-2, rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.running_mean[0].item(), 3.0)


def test_an_output_that_is_dropped_is_freed_at_once():
    norm = layer(BatchlessNorm2d)
    gc.disable()
    try:
        dropped = weakref.ref(norm(torch.randn(2, 3, 4, 4).double()))
        assert dropped() is None
    finally:
        gc.enable()


def test_a_copy_is_not_attached_but_equal():
    norm = layer(BatchlessNorm1d)
    normkit.attach(norm, torch.optim.SGD(norm.parameters(), lr=0.1))
    clone = copy.deepcopy(norm)
    assert norm.is_collected
    assert not clone.is_collected
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(clone(x), norm(x), rtol=0, atol=0)
