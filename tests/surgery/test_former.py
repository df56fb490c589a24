"""Models that were pickled when the package was called evenkeel load, compute what they computed, and can be reverted."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import normkit
from normkit.surgery import former

# Written by evenkeel 0.1.0 (commit 4f64281): {"x": input, "models": {what was done to a small net: (net, eval output)}}.
FILE = Path(__file__).parent / "data" / "evenkeel_models.pt"
SAME_AFTER_REVERT = {"batch-renorm", "batchless", "l1", "l2", "linf", "noisy-batch", "apply batchless"}
CONVERTED = ["none", "group", "layer", "apply bnp", *sorted(SAME_AFTER_REVERT)]


@pytest.fixture(name="saved")
def _saved():
    return torch.load(FILE, pickle_module=former, weights_only=False)


def test_each_former_model_computes_what_it_computed(saved):
    assert set(CONVERTED) < set(saved["models"])
    for name, (model, expected) in saved["models"].items():
        torch.testing.assert_close(model(saved["x"]), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_former_converted_model_is_described_trained_and_reverted(saved, name):
    (model, expected), x = saved["models"][name], saved["x"]
    assert "in place of BatchNorm2d" in str(normkit.describe(model)[0])
    reverted = normkit.revert(model)
    assert type(reverted[1]) is nn.BatchNorm2d
    if name in SAME_AFTER_REVERT:
        torch.testing.assert_close(reverted(x), expected)
    reverted.train()(x).sum().backward()
    assert reverted[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", CONVERTED)
def test_a_former_converted_model_loads_the_state_dict_of_the_plain_one(saved, name):
    model = saved["models"][name][0]
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), *model[2:])
    assert not any(model.load_state_dict(plain.state_dict()))


def test_a_former_revisited_model_gives_its_scale_the_smaller_learning_rate(saved):
    groups = normkit.param_groups(saved["models"]["revisited, paper"][0], lr=1.0)
    assert {g["lr"] for g in groups for p in g["params"] if p.shape == (4,)} == {1.0, 0.01}


def test_a_former_name_without_counterpart_is_an_error_that_says_what_to_do():
    pickled = b"cevenkeel.methods.batchless_projected\nGradientControl\n."
    with pytest.raises(
        pickle.UnpicklingError, match="GradientControl has no counterpart in normkit; load the file with"
    ):
        former.load(io.BytesIO(pickled))


def test_pickles_of_today_load_with_it_as_well():
    model = normkit.convert(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "batchless")
    loaded = former.load(io.BytesIO(pickle.dumps(model)))
    assert [str(a) for a in normkit.describe(loaded)] == [str(a) for a in normkit.describe(model)]
