"""Frozen statistics: the same function in both modes, statistics that never move, scale and shift that train."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkit.methods.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, warn_if_untrained

CASES = [
    (FrozenBatchNorm1d, nn.BatchNorm1d, (6, 3)),
    (FrozenBatchNorm1d, nn.BatchNorm1d, (2, 3, 5)),
    (FrozenBatchNorm2d, nn.BatchNorm2d, (1, 3, 4, 2)),
    (FrozenBatchNorm3d, nn.BatchNorm3d, (1, 3, 2, 2, 2)),
]


def pretrained(batchnorm, shape, dtype=torch.float64):
    torch.manual_seed(0)
    norm = batchnorm(3, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for _ in range(3):
        norm(torch.randn(8, *shape[1:], dtype=dtype) * 2 + 1)
    return norm


@pytest.mark.parametrize(("cls", "batchnorm", "shape"), CASES)
def test_training_is_an_affine_map_with_its_gradients(cls, batchnorm, shape):
    norm = pretrained(batchnorm, shape)
    layer = cls.from_batchnorm(norm)
    statistics = {name: b.clone() for name, b in layer.named_buffers()}
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    column = (1, -1) + (1,) * (len(shape) - 2)
    normal = (x - norm.running_mean.view(column)) / (norm.running_var + norm.eps).sqrt().view(column)
    expected = normal * norm.weight.view(column) + norm.bias.view(column)
    seed = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, norm.weight, norm.bias), seed)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, (x, layer.weight, layer.bias), seed), wanted)
    assert all(torch.equal(b, statistics[name]) for name, b in layer.named_buffers())
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.eval()(x), expected, rtol=1e-12, atol=1e-12)


def test_a_step_trains_scale_and_shift_and_nothing_else():
    layer = FrozenBatchNorm2d.from_batchnorm(pretrained(nn.BatchNorm2d, (1, 3, 4, 2)))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 3, 4, 2, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert {name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])} == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_channels_last_are_kept(dtype):
    layer = FrozenBatchNorm2d.from_batchnorm(pretrained(nn.BatchNorm2d, (1, 3, 4, 2), torch.float32))
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight,
        layer.bias), rtol=2e-2, atol=2e-2)  # fmt: skip


def test_one_value_per_channel_is_no_trouble():
    assert FrozenBatchNorm2d(3)(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_layers_that_have_seen_no_data_are_named(caplog):
    seen = FrozenBatchNorm2d.from_batchnorm(pretrained(nn.BatchNorm2d, (1, 3, 4, 2)))
    with caplog.at_level(logging.WARNING, logger="normkit"):
        warn_if_untrained(nn.Sequential(seen))
        assert not caplog.records
        warn_if_untrained(nn.Sequential(seen, FrozenBatchNorm2d(3)))
    assert "1 layers normalize with mean 0 and variance 1" in caplog.text
    assert ": 1;" in caplog.text
