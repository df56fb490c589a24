"""Layers whose tensors or attributes are read without calling them are found, and nothing changes their function."""

import inspect
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit


class Tied(nn.Module):  # an autoencoder
    def __init__(self):
        super().__init__()
        self.enc, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x):
        return F.linear(torch.relu(self.norm(self.enc(x))), self.enc.weight.t())


class UntraceableInAMethod(Tied):
    def forward(self, x):
        code = torch.relu(self.norm(self.enc(x))) if x.sum() < 1e9 else x
        return self.decode(code)

    def decode(self, code):
        return F.linear(code, self.enc.weight.t())


class Penalized(Tied):  # a penalty on gamma
    def forward(self, x):
        return self.norm(self.enc(x)) + self.norm.weight.square().sum()


class AnyLayer(Tied):
    def forward(self, x):
        total = sum(layer.weight.sum() for layer in self.children()) if x.sum() < 1e9 else 0
        return self.norm(self.enc(x)) + total


NETS = [Tied, UntraceableInAMethod, Penalized, AnyLayer]


def trained(cls):
    torch.manual_seed(0)
    model, x = cls().double(), torch.randn(64, 6, dtype=torch.float64) * 3
    for _ in range(30):
        model(x)
    return model, x


@pytest.mark.parametrize("cls", NETS)
def test_fold_leaves_a_layer_whose_weight_is_used_as_a_tensor(cls):
    model, x = trained(cls)
    with pytest.warns(UserWarning, match="fold: 1 layer stays"):
        folded = normkit.fold(model.eval())
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize("cls", [Tied, UntraceableInAMethod, AnyLayer])
def test_a_weight_used_as_a_tensor_is_not_put_on_the_sphere(cls):
    model, x = trained(cls)
    before = model(x).detach()
    entry = normkit.scale_invariance(model)["enc.weight"]
    assert not entry.invariant
    assert "weight" in entry.reason
    normkit.param_groups(model, lr=0.1, manifold_lr=0.2)
    assert torch.equal(model(x), before)


def test_bnp_leaves_a_tied_weight_alone():
    with pytest.raises(ValueError, match="enc: the model uses its weight as a tensor"):
        normkit.BNP(Tied())


def test_an_untraceable_model_that_only_calls_its_layers_is_folded():
    class Wild(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return self.block(x.to(self.block[0].weight.dtype)) if x.sum() < 1e9 else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(normkit.fold(Wild().eval()).block[1]) is nn.Identity


class Hybrid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 3, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.block(self.stem(x).mT)


@pytest.mark.parametrize("to", ["batchless", "none"])
def test_train_and_eval_agree_behind_torchs_fast_path(to, caplog):
    torch.manual_seed(0)
    model, x = Hybrid(), torch.randn(4, 3, 20)
    caplog.set_level(logging.WARNING, "normkit")
    normkit.convert(model, to, where=lambda path, layer: True)
    assert type(model.block.norm1) is nn.LayerNorm
    assert "block.norm1: block (TransformerEncoderLayer) reads its " in caplog.text
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["none", "batchless", "group"])
def test_layer_normalization_stays_in_a_hybrid_unless_asked_for(to):
    def net():
        return nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Linear(6, 6), nn.LayerNorm(6), nn.GroupNorm(2, 8)
        )

    model = normkit.convert(net(), to)
    assert type(model[1]) is not nn.BatchNorm1d
    assert type(model[3]) is nn.LayerNorm
    assert (type(model[4]) is nn.GroupNorm) == (to in ("none", "group"))
    if to != "group":
        assert type(normkit.convert(net(), to, where=["3"])[3]) is not nn.LayerNorm


def over_positions(*layers):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double()
    x = torch.randn(16, 3, *(6,) * (2 if isinstance(layers[0], nn.Conv2d) else 1), dtype=torch.float64) + 1
    for _ in range(20):
        model(x)
    return model, x


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Conv1d(3, 4, 3), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)),  # as many positions as channels
        lambda: (nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)),
        lambda: (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm2d(4)),
        lambda: (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Linear(4, 4)),
    ],
)
def test_a_linear_layer_over_positions_has_nothing_to_do_with_channels(layers):
    model, x = over_positions(*layers())
    before = model(x).detach()
    assert not normkit.scale_invariance(model)["2.weight" if isinstance(model[2], nn.Linear) else "3.weight"].invariant
    normkit.param_groups(model, lr=0.1, manifold_lr=0.1)
    torch.testing.assert_close(model(x), before)
    with pytest.warns(
        UserWarning, match="the Linear (before|behind) it works on the last dimension, which is not that"
    ):
        folded = normkit.fold(model.eval())
    torch.testing.assert_close(folded(x), model(x))


class Switched(nn.Module):
    """Reads its normalization in a branch that a setting opens, as PyTorch Geometric's and PEFT's layers do."""

    def __init__(self, *, single, merged=False):
        super().__init__()
        self.single, self.merged = single, merged
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        if not self.merged and (x.sum() < 1e9):
            x = self.linear(x)
        if self.single and x.size(0) <= 1:
            return F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
        return self.norm(x)


@pytest.mark.parametrize("single", [True, False])
def test_branches_that_a_setting_excludes_are_not_read(single, caplog):
    model = nn.Sequential(Switched(single=single), nn.BatchNorm1d(4))
    normkit.convert(model, "batchless")
    assert isinstance(model[0].norm, nn.BatchNorm1d) == single
    assert ("reads its running_" in caplog.text) == single


def test_the_parameters_of_a_signature_are_no_tensors():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(4, 4)

        def forward(self, x):
            names = set(inspect.signature(self.query.forward).parameters.keys())
            return self.query(x) if x.sum() < 1e9 else x * len(names)

    assert normkit.BNP(Attention()).skipped == {}
