"""Preconditioned Langevin dynamics: its noise has the metric of its drift, and it samples the posterior."""

import pytest
import torch
from torch import nn

from normkit import BNP, LangevinBNP
from normkit.functional import precondition, preconditioned_noise

UNITS = 40_000


@pytest.mark.parametrize("rule", ["bias", "no bias", "mean removed"])
@pytest.mark.parametrize("layout", ["linear", "grouped convolution", "transposed convolution"])
def test_the_noise_has_the_covariance_that_preconditions_the_gradient(layout, rule):
    generator = torch.Generator().manual_seed(0)
    groups = 2 if layout == "grouped convolution" else 1
    transposed = layout == "transposed convolution"
    shapes = {"linear": (UNITS, 3), "grouped convolution": (UNITS, 2, 2), "transposed convolution": (3, UNITS, 2)}
    shape = shapes[layout]
    mean = torch.tensor([0.5, -2.0, 1.0, 0.3], dtype=torch.float64)[: 4 if groups == 2 else 3]
    variance = torch.tensor([0.2, 3.0, 1.0, 0.7], dtype=torch.float64)[: len(mean)]
    options = {"groups": groups, "transposed": transposed, "divisor": 2.0, "mean_removed": rule == "mean removed"}
    bias = torch.zeros(UNITS) if rule == "bias" else None
    zeros = torch.zeros(shape)
    weight_noise, bias_noise = preconditioned_noise(zeros, bias, mean, variance, generator=generator, **options)

    def units(weight):
        return weight.transpose(0, 1).reshape(UNITS, -1) if transposed else weight.reshape(UNITS, -1)

    first = UNITS // groups  # the units of the first group
    noise = units(weight_noise)[:first]
    if bias_noise is not None:
        noise = torch.cat([bias_noise[:first, None], noise], 1)
    size = noise.shape[1]
    taps = 1 if len(shape) == 2 else shape[2]
    inputs = (size - (rule == "bias")) // taps
    expected = []
    for k in range(size):  # the preconditioner, applied to unit gradients of one unit
        unit = torch.zeros(size, dtype=torch.float64)
        unit[k] = 1
        flat = unit[1:] if rule == "bias" else unit
        grad = flat.reshape(1, inputs, taps) if len(shape) == 3 else flat.reshape(1, inputs)
        w, b = precondition(
            grad,
            unit[:1] if rule == "bias" else None,
            mean[:inputs],
            variance[:inputs],
            divisor=2.0,
            mean_removed=rule == "mean removed",
        )
        expected.append(torch.cat(([b] if b is not None else []) + [w.flatten()]))
    covariance = noise.T @ noise / len(noise)
    assert (covariance - torch.stack(expected)).abs().max() < 0.03 * torch.stack(expected).diagonal().max()


def test_the_samples_have_the_covariance_of_the_posterior():
    torch.manual_seed(0)
    x = torch.randn(30, 2, dtype=torch.float64) * torch.tensor([0.3, 2.0]) + torch.tensor([1.0, -1.0])
    layer = nn.Linear(2, 500).double()  # 500 chains side by side
    bnp = BNP(layer, eps_relative=0.0, eps=1e-12)
    sampler = LangevinBNP(bnp, layer.parameters(), lr=0.01)
    target = x @ torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    samples = []
    for step in range(400):
        sampler.zero_grad()
        ((layer(x) - target).square().sum() / 2).backward()
        sampler.step()
        if step >= 200 and step % 20 == 0:
            samples.append(torch.cat([layer.bias[:, None], layer.weight], 1).detach())
    ones = torch.cat([torch.ones(30, 1, dtype=torch.float64), x], 1)
    posterior = torch.linalg.inv(ones.T @ ones)
    covariance = torch.cov(torch.cat(samples).T)
    assert torch.allclose(covariance, posterior, rtol=0.25, atol=0.05 * posterior.max().item())
    assert torch.allclose(torch.cat(samples).mean(0), torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64), atol=0.1)


def test_a_bounded_drift_or_a_step_of_zero_is_refused():
    layer = nn.Linear(2, 3)
    bnp = BNP(layer, max_change=0.1)
    with pytest.raises(ValueError, match="bounds the drift and not the noise"):
        LangevinBNP(bnp, layer.parameters(), lr=0.1)
    bnp.remove()
    with pytest.raises(ValueError, match="lr must be positive"):
        LangevinBNP(BNP(layer), layer.parameters(), lr=0.0)
