"""Condition numbers against numpy's on matrices written out row by row."""

import numpy as np
import pytest
import torch
from torch import nn

from normkit.instruments import conditioning


def total(model, batch):
    return model(batch).square().mean()


def expected(rows):
    rows = rows.double().numpy()
    one = np.concatenate([np.ones((len(rows), 1)), rows], 1)
    centred = np.concatenate([np.ones((len(rows), 1)), rows - rows.mean(0)], 1)
    scaled = np.concatenate([np.ones((len(rows), 1)), (rows - rows.mean(0)) / rows.std(0)], 1)
    return [np.linalg.cond(m.T @ m / len(m)) for m in (one, centred, scaled)]


def test_linear_layer_over_several_batches():
    torch.manual_seed(0)
    x = torch.randn(90, 5, dtype=torch.float64) * torch.tensor([1.0, 2, 0.3, 1, 4]) + torch.tensor([3.0, 0, 0, 1, -2])
    found = conditioning(nn.Linear(5, 2).double(), total, x.split(30)).layers[0]
    assert [found.raw, found.centred, found.preconditioned] == pytest.approx(expected(x), rel=1e-8)
    assert found.rows == 90
    assert found.enough_rows
    # centring never hurts, and scaling is within sqrt(n + 1) of the best diagonal one
    assert found.raw >= found.centred
    assert found.preconditioned < found.centred


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(3, 2, 3, padding=1),
        nn.Conv2d(2, 2, 3, stride=2, padding=1),
        nn.Conv2d(2, 2, (2, 3), dilation=2, padding=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(1, 2, 2),
    ],
)
def test_convolution_sees_the_patches_its_weights_meet(conv):
    torch.manual_seed(0)
    conv = conv.double()
    dims = len(conv.kernel_size)
    x = torch.randn(40, conv.in_channels, *[5] * dims, dtype=torch.float64) + 1
    found = conditioning(conv, total, [x]).layers[0]
    # the gradient of one output position with respect to the weights is its patch
    with torch.no_grad():
        out = conv(x)
    patches = []
    for n in range(40):
        for position in np.ndindex(*out.shape[2:]):
            y = conv(x[n : n + 1])[(0, 0, *position)]
            patches.append(torch.autograd.grad(y, conv.weight)[0][0].flatten())
    assert found.features == conv.weight[0].numel()
    assert [found.raw, found.centred, found.preconditioned] == pytest.approx(expected(torch.stack(patches)), rel=1e-6)


def test_dead_features_are_counted_and_left_out():
    torch.manual_seed(0)
    x = torch.randn(50, 3, dtype=torch.float64)
    padded = torch.cat([x, torch.full((50, 1), 7.0), torch.zeros(50, 1)], 1).double()
    found = conditioning(nn.Linear(5, 2).double(), total, [padded]).layers[0]
    assert found.dead == 2
    assert found.raw == pytest.approx(expected(x)[0], rel=1e-8)


def test_tokens_are_rows_and_few_rows_are_said():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    found = conditioning(nn.Linear(3, 2).double(), total, [x]).layers[0]
    assert found.rows == 24
    assert not found.enough_rows
    assert found.raw == pytest.approx(expected(x.reshape(24, 3))[0], rel=1e-8)


def test_depthwise_and_wide_convolutions_count_channels():
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 200, 1), nn.Conv2d(200, 2, 3))
    found = conditioning(net, total, [torch.randn(3, 6, 9, 9)]).layers
    assert [(layer.features, layer.patches) for layer in found] == [(6, False), (6, True), (200, False)]


def test_unknown_layers_and_empty_batches_are_refused():
    with pytest.raises(ValueError, match="'7'"):
        conditioning(nn.Sequential(nn.Linear(2, 2)), total, [torch.ones(2, 2)], layers=["7"])
    with pytest.raises(ValueError, match="no batch"):
        conditioning(nn.Linear(2, 2), total, [])
