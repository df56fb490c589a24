"""Condition numbers against numpy's on matrices written out row by row."""

import numpy as np
import pytest
import torch
from torch import nn

from normkit import BNP
from normkit.instruments import conditioning


def total(model, batch):
    return model(batch).square().mean()


def expected(rows):
    rows = rows.double().numpy()
    one = np.concatenate([np.ones((len(rows), 1)), rows], 1)
    centred = np.concatenate([np.ones((len(rows), 1)), rows - rows.mean(0)], 1)
    return [np.linalg.cond(m.T @ m / len(m)) for m in (one, centred)]


def preconditioned(rows, bnp):
    """Kappa of ``P^T M P`` with P as the matrix that the state of BNP says; a channel's taps side by side."""
    (entry,) = bnp.state_dict().values()
    mean, variance = entry["mean"].numpy(), entry["variance"].numpy()
    guarded = variance + 1e-2 * variance.max() + 1e-4
    taps = rows.shape[1] // len(mean)
    center = np.eye(1 + rows.shape[1])
    center[0, 1:] = -np.repeat(mean, taps)
    p = center @ np.diag(np.concatenate([[1], np.repeat(guarded, taps) ** -0.5]))
    one = np.concatenate([np.ones((len(rows), 1)), rows.double().numpy()], 1)
    return np.linalg.cond(p.T @ (one.T @ one / len(one)) @ p)


def stepped(model, x):
    """A BNP of the model after one step on ``x``."""
    bnp = BNP(model)
    model(x).square().mean().backward()
    bnp.precondition_()
    return bnp


def test_linear_layer_over_several_batches():
    torch.manual_seed(0)
    x = torch.randn(90, 5, dtype=torch.float64) * torch.tensor([1.0, 2, 0.3, 1, 4]) + torch.tensor([3.0, 0, 0, 1, -2])
    model = nn.Linear(5, 2).double()
    bnp = stepped(model, x[:50] + 1)
    found = conditioning(model, total, x.split(30), preconditioners=bnp.preconditioners()).layers[0]
    assert [found.raw, found.centred] == pytest.approx(expected(x), rel=1e-8)
    assert found.preconditioned == pytest.approx(preconditioned(x, bnp), rel=1e-8)
    assert found.rows == 90
    assert found.enough_rows
    assert found.raw >= found.centred  # centring never hurts


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(3, 2, 3, padding=1),
        nn.Conv2d(2, 2, 3, stride=2, padding=1),
        nn.Conv2d(2, 2, (2, 3), dilation=2, padding=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(1, 2, 2),
        nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose1d(2, 2, 3, dilation=2),
    ],
)
def test_convolution_sees_the_patches_its_weights_meet(conv):
    torch.manual_seed(0)
    conv = conv.double()
    dims = len(conv.kernel_size)
    x = torch.randn(40, conv.in_channels, *[5] * dims, dtype=torch.float64) + 1
    bnp = stepped(conv, x[:20])
    found = conditioning(conv, total, [x], preconditioners=bnp.preconditioners()).layers[0]
    # the gradient of one output position with respect to the weights is its patch
    with torch.no_grad():
        out = conv(x)
    patches = []
    for n in range(40):
        for position in np.ndindex(*out.shape[2:]):
            y = conv(x[n : n + 1])[(0, 0, *position)]
            gradient = torch.autograd.grad(y, conv.weight)[0]
            patches.append((gradient[:, 0] if conv.transposed else gradient[0]).flatten())
    patches = torch.stack(patches)
    assert found.features == patches.shape[1]
    assert [found.raw, found.centred] == pytest.approx(expected(patches), rel=1e-6)
    assert found.preconditioned == pytest.approx(preconditioned(patches, bnp), rel=1e-6)


def test_without_a_preconditioner_nothing_is_preconditioned_and_a_wrong_one_is_refused():
    x = torch.randn(30, 4)
    found = conditioning(nn.Linear(4, 2), total, [x])
    assert found.layers[0].preconditioned is None
    assert len(found.plot().lines) == 2
    with pytest.raises(ValueError, match="3 features"):
        conditioning(nn.Linear(4, 2), total, [x], preconditioners={"": (torch.zeros(3), torch.ones(3))})


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


def test_statistics_of_patches_condition_a_padded_convolution_on_a_small_map_better_than_those_of_channels():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(400, 3, 4, 4, dtype=torch.float64).relu() + 1
    kappa = {}
    for statistics in ("patches", "channels"):
        bnp = BNP(conv, statistics=statistics)
        conv(x).square().mean().backward()
        bnp.precondition_()
        kappa[statistics] = conditioning(conv, total, [x], preconditioners=bnp.preconditioners()).layers[0]
        bnp.remove()
    assert 2 * kappa["patches"].preconditioned < kappa["channels"].preconditioned
    assert kappa["patches"].preconditioned < kappa["patches"].raw
