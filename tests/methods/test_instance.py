"""Instance normalization against its definition in float64, and what becomes of flat features."""

import pytest
import torch
from torch import nn

import normkit

CASES = [
    (nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d, (2, 3, 6)),
    (nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d, (2, 3, 5, 4)),
    (nn.Conv3d, nn.BatchNorm3d, nn.InstanceNorm3d, (1, 3, 3, 3, 2)),
]


@pytest.mark.parametrize(("conv", "batchnorm", "instancenorm", "shape"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_each_channel_of_each_sample_is_normalized_by_itself(conv, batchnorm, instancenorm, shape, training):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4, 2), batchnorm(4)).double().train(training)
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    x = torch.randn(shape).double() * 3 + 1
    h = model[0](x)
    expected = torch.empty_like(h)
    for sample in range(len(h)):
        for channel in range(4):
            values = h[sample, channel]
            normal = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
            expected[sample, channel] = normal * model[1].weight[channel] + model[1].bias[channel]
    oracle = instancenorm(4, affine=True).double()
    oracle.load_state_dict({name: model[1].state_dict()[name] for name in ("weight", "bias")})
    statistics = [buffer.clone() for buffer in model[1].buffers()]
    normkit.convert(model, "instance")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), oracle(h), rtol=1e-12, atol=1e-12)
    normkit.revert(model)
    assert all(torch.equal(a, b) for a, b in zip(model[1].buffers(), statistics, strict=True))


def test_flat_features_keep_their_normalization_and_the_log_names_it(caplog):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.BatchNorm1d(4),
    )
    with pytest.warns(UserWarning, match="instance does little here: 1 of 3"):
        normkit.apply("instance", model, lr=0.1)
    assert [type(model[i]) for i in (1, 4, 6)] == [nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm1d]
    assert "4 (BatchNorm1d) normalizes flat features" in caplog.text
    assert "6 (BatchNorm1d) normalizes flat features" in caplog.text


@pytest.mark.parametrize("to", ["group", "layer"])
def test_groups_of_few_flat_features_are_named_and_single_features_stay(to, caplog):
    model = nn.Sequential(
        nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 4), nn.BatchNorm1d(4)
    )
    normkit.convert(model, to)
    assert [type(model[i]) for i in (1, 3, 5)] == [nn.BatchNorm1d, nn.GroupNorm, nn.GroupNorm]
    assert f"{to!r} would leave nothing: it stays as it is" in caplog.text
    assert f"{to!r} would leave little, since it normalizes 2 at a time" in caplog.text
    assert "5 (BatchNorm1d)" not in caplog.text


def test_single_positions_are_seen_behind_pooling_and_dropout(caplog):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 1),
        nn.BatchNorm1d(4),
    )  # fmt: skip
    normkit.convert(model, "instance")
    assert [type(model[i]) for i in (1, 5, 9, 12)] == [nn.GroupNorm, nn.BatchNorm2d, nn.BatchNorm1d, nn.GroupNorm]
    assert "5 (BatchNorm2d) normalizes flat features or single positions" in caplog.text
