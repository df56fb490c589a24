"""Noisy batch normalization: the noise has the stated distribution, and evaluation is without it."""

import pytest
import torch
from torch import nn

import normkit
from normkit.methods.noisy_norm import MomentNoise, NoisyBatchNorm2d, moment_noise
from tests.cases import norm_cases

LAYERS = norm_cases("NoisyBatchNorm")


def test_shift_and_scale_have_the_stated_distributions():
    torch.manual_seed(0)
    shift = moment_noise(torch.zeros(2000, 400))
    centre = shift.mean(0)
    assert -0.51 < centre.min() < -0.45
    assert 0.45 < centre.max() < 0.51
    assert ((shift - centre).abs() < 0.11).all()
    assert (shift - centre).std().item() == pytest.approx(0.2 / 12**0.5, rel=0.01)
    scale = moment_noise(torch.full((2000, 400), 1e6)) / 1e6
    assert 0.99 < scale.mean(0).min() < 1.02
    assert 1.23 < scale.mean(0).max() < 1.26
    assert (scale - scale.mean(0)).std().item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(("noisy", "plain", "shape"), LAYERS)
def test_output_is_batch_normalization_plus_the_noise(noisy, plain, shape):
    reference = plain(3)
    layer = noisy.from_batchnorm(reference)
    x = torch.randn(shape)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, moment_noise(reference(x)), rtol=0, atol=0)
    torch.testing.assert_close(layer.running_var, reference.running_var, rtol=0, atol=0)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(("noisy", "plain", "shape"), LAYERS)
def test_conversion_shares_parameters_and_keeps_keys(noisy, plain, shape):
    reference = plain(3).eval()
    layer = noisy.from_batchnorm(reference)
    assert layer.weight is reference.weight
    assert layer.state_dict().keys() == reference.state_dict().keys()
    assert not layer.training
    assert layer.running_mean is not reference.running_mean


def test_noise_alone_is_the_identity_in_evaluation():
    x = torch.randn(4, 3)
    assert MomentNoise().eval()(x) is x
    assert not torch.equal(MomentNoise()(x), x)


def test_recipe_replaces_every_batch_normalization():
    model, _ = normkit.apply("noisy-batch", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lr=0.1)
    assert isinstance(model[1], NoisyBatchNorm2d)
    assert normkit.convert(model, "noisy-batch")[1] is model[1]
