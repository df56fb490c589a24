"""The projected gradient of batchless normalization against batch normalization's backward pass, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evenkeel
from evenkeel.functional import forecast, projected_gradient
from evenkeel.methods.batchless import BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from evenkeel.methods.batchless_projected import regression
from evenkeel.methods.batchless_training import collect
from evenkeel.moments import observe

CASES = [
    (BatchlessNorm1d, nn.BatchNorm1d, (7, 3)),
    (BatchlessNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (BatchlessNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    (BatchlessNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
]


def rows(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("cls", "bn_cls", "shape"), CASES)
def test_with_the_batchs_own_means_it_is_batch_normalizations_backward(cls, bn_cls, shape, affine):
    torch.manual_seed(0)
    bn = bn_cls(3, affine=affine, eps=1e-30, dtype=torch.float64)
    norm = cls(3, affine=affine, projected=True, eps=0.0, dtype=torch.float64)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(bn.weight.uniform_(0.5, 2))
            norm.bias.copy_(bn.bias.normal_())
    x = torch.randn(shape).double() * 3 + 2
    coefficients = torch.randn(shape).double()
    variance, mean = torch.var_mean(rows(x), 0, correction=0)
    norm.set_statistics(mean, variance)
    n = (rows(x) - mean) / variance.sqrt()
    gamma = norm.weight.detach() if affine else torch.ones(3).double()
    grad_n = rows(coefficients) * gamma
    norm.control.shift.copy_(grad_n.sum(0))
    norm.control.slope.copy_((grad_n * n).sum(0))
    norm.control.rows.fill_(len(n))
    for module in (bn, norm):
        module.input = x.clone().requires_grad_()
        (module(module.input) * coefficients).sum().backward()
    torch.testing.assert_close(norm.input.grad, bn.input.grad, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip((norm.weight, norm.bias), (bn.weight, bn.bias), strict=True):
        if affine:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "_", "shape"), CASES)
def test_a_repeated_step_is_orthogonal_to_one_and_to_n_wherever_mu_and_sigma_are(cls, _, shape):
    torch.manual_seed(0)
    norm = cls(3, projected=True, dtype=torch.float64)
    norm.set_collected(True)
    norm.set_statistics(torch.randn(3).double(), (torch.rand(3).double() + 0.5).square())
    x = torch.randn(shape).double() * 2 + 1
    coefficients = torch.randn(shape).double()
    for _ in range(300):
        leaf = x.clone().requires_grad_()
        (norm(leaf) * coefficients).sum().backward()
        collect([norm])
    residual = rows(leaf.grad)
    assert residual.sum(0).abs().max() < 1e-12
    assert (residual * rows(x)).sum(0).abs().max() < 1e-12
    assert residual.abs().max() > 0.01


def test_the_regression_removes_exactly_what_one_and_n_explain():
    torch.manual_seed(0)
    n = torch.randn(100, 3).double() * 2 + 1
    grad_n = torch.randn(100, 3).double()
    moments = observe(n)
    m2 = moments.variance + moments.mean.square()
    shift, slope = regression(grad_n.mean(0), (grad_n * n).mean(0), moments.mean, m2)
    residual = projected_gradient(grad_n, n, shift, slope)
    assert residual.mean(0).abs().max() < 1e-12
    assert (residual * n).mean(0).abs().max() < 1e-12


def test_starts_as_the_papers_gradient():
    torch.manual_seed(0)
    x, coefficients = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 3, 5, 5).double()
    grads = []
    for projected in (False, True):
        leaf = x.clone().requires_grad_()
        (BatchlessNorm2d(3, projected=projected, dtype=torch.float64)(leaf) * coefficients).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


def step(norm, x, coefficients):
    """One training step of a mean loss; returns the gradient of x."""
    leaf = x.clone().requires_grad_()
    (norm(leaf) * coefficients).sum(1).mean().backward()
    collect([norm])
    return leaf.grad


def trained_norm():
    norm = BatchlessNorm1d(3, projected=True, dtype=torch.float64)
    norm.set_collected(True)
    torch.manual_seed(0)
    x, coefficients = torch.randn(16, 3).double() + 1, torch.randn(16, 3).double()
    for _ in range(100):
        step(norm, x, coefficients)
    return norm, x, coefficients


def test_a_short_last_batch_does_not_corrupt_what_was_learned():
    norm, x, coefficients = trained_norm()
    shift, slope = norm.control.shift.clone(), norm.control.slope.clone()
    full = step(norm, x, coefficients)
    step(norm, x[:4], coefficients[:4])
    norm.control.shift.copy_(shift)
    norm.control.slope.copy_(slope)
    after = step(norm, x, coefficients)  # the step after the short one still knows the size of full ones
    torch.testing.assert_close(after, full, rtol=1e-6, atol=1e-9)


def test_repeating_the_rows_of_a_mean_loss_does_not_change_what_is_learned():
    norm, x, coefficients = trained_norm()
    twice = BatchlessNorm1d(3, projected=True, dtype=torch.float64)
    twice.set_collected(True)
    for _ in range(100):
        step(twice, x.repeat(2, 1), coefficients.repeat(2, 1))
    torch.testing.assert_close(twice.control.shift, norm.control.shift, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twice.control.slope, norm.control.slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("producer", "shape"),
    [
        (nn.Linear(6, 4, bias=False), (200, 6)),
        (nn.Conv1d(6, 4, 3, groups=2, bias=False), (50, 6, 9)),
        (nn.Conv2d(6, 4, 1, bias=False), (50, 6, 3, 3)),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", bias=False), (50, 6, 5, 5)),
    ],
)
def test_the_forecast_is_exact_for_uncorrelated_inputs(producer, shape):
    torch.manual_seed(0)
    producer = producer.double()
    moments = observe(torch.randn(shape).double() * 2 + 3, 1)
    # an ensemble with exactly these means and variances, and independent entries: moments of W h in closed form
    weight = producer.weight.detach()
    new = weight + torch.randn_like(weight) / 4
    groups = getattr(producer, "groups", 1)
    shift, growth = forecast(weight, new, moments.mean, moments.variance, groups=groups)
    for out in range(4):
        mine = slice(0, 6) if groups == 1 else slice(3 * (out // 2), 3 * (out // 2) + 3)
        m, s = moments.mean[mine], moments.variance[mine]
        spread = [
            (w[out].flatten(1).square() * s[:, None]).sum() if w.dim() > 2 else (w[out].square() * s).sum()
            for w in (weight, new)
        ]
        means = [(w[out].flatten(1) * m[:, None]).sum() if w.dim() > 2 else (w[out] * m).sum() for w in (weight, new)]
        torch.testing.assert_close(shift[out], means[1] - means[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(growth[out], spread[1] / spread[0], rtol=1e-12, atol=1e-12)


def test_the_forecast_keeps_the_output_normalized_through_a_large_step():
    misfits = {}
    for projected in (False, True):
        torch.manual_seed(0)
        norm = BatchlessNorm1d(8, projected=projected, eps=0.0)
        model = nn.Sequential(nn.Linear(20, 8, bias=False), norm).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        x = torch.randn(500, 20).double()
        x = torch.linalg.qr(x - x.mean(0))[0] * 500**0.5 + 2  # mean 2, covariance exactly the identity
        evenkeel.initialize(model, [x])
        evenkeel.attach(model, optimizer)
        (model(x) * torch.randn(500, 8).double()).mean(0).sum().backward()
        optimizer.step()
        n = (model[0](x).detach() - norm.running_mean) / norm.sigma
        misfits[projected] = n.square().mean().sub(1).abs().item()
    assert misfits[True] < 1e-9
    assert misfits[False] > 0.1


def test_a_step_at_a_misfit_counts_for_less():
    gradients = {}
    for factor in (1.0, 3.0):
        torch.manual_seed(0)
        model = nn.Sequential(BatchlessNorm1d(4, projected=True), nn.Linear(4, 2)).double()
        optimizer = torch.optim.SGD(model[1].parameters(), lr=1.0)
        x = torch.randn(100, 4).double()
        evenkeel.initialize(model, [x])
        evenkeel.attach(model, optimizer)
        model(factor * x).sum().backward()
        raw = model[1].bias.grad.clone()
        optimizer.step()
        gradients[factor] = (model[1].bias.grad / raw).mean().item()
    assert gradients[1.0] == 1
    assert gradients[3.0] == pytest.approx(1.5 / 9, rel=0.05)


def test_sigma_inflates_less_than_with_the_papers_gradient():
    inflation = {}
    for projected in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(10, 16, bias=False), BatchlessNorm1d(16, projected=projected), nn.ReLU(), nn.Linear(16, 2)]
        model = nn.Sequential(*layers)
        x = torch.randn(256, 10)
        labels = (x[:, 0] * x[:, 1] > 0).long()
        evenkeel.initialize(model, [x])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        evenkeel.attach(model, optimizer)
        start = model[1].sigma.log().mean()
        for at in range(0, 16 * 200, 16):
            index = torch.arange(at, at + 16) % 256
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), labels[index]).backward()
            optimizer.step()
        inflation[projected] = (model[1].sigma.log().mean() - start).item()
    assert inflation[True] < 0.7 * inflation[False]


def test_a_changed_loss_scale_is_forgotten_in_a_few_steps():
    norm, x, coefficients = trained_norm()
    shift = norm.control.shift.clone()
    for _ in range(12):
        step(norm, x, coefficients / 2)
    torch.testing.assert_close(norm.control.shift, shift / 2, rtol=0.05, atol=1e-3)
