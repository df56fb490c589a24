"""Parameters are grouped by what they are: the type of their module, never their name or dimensions."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from normkit.methods.revisited.revisit import revisit
from normkit.optim.param_groups import own_kinds, param_groups


class NamesThatMislead(nn.Module):
    """A norm whose name does not say so, a (1, n) weight, and one-dimensional weights that are no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weighty = nn.BatchNorm2d(4)
        self.bn_like_name = nn.Linear(4, 1)  # weight (1, 4)
        self.activation = nn.PReLU(4)
        self.weight = nn.Parameter(torch.ones(4))  # one-dimensional, of an unknown module


def names(model, **kwargs):
    owner = {p: name for name, p in model.named_parameters()}
    groups = param_groups(model, lr=1.0, weight_decay=0.1, **kwargs)
    return {group["name"]: sorted(owner[p] for p in group["params"]) for group in groups}


def test_kind_follows_module_type_where_names_and_dimensions_mislead():
    assert names(NamesThatMislead()) == {
        "weights": ["bn_like_name.weight", "conv.weight"],
        "biases": ["bn_like_name.bias", "conv.bias"],
        "norm-scales": ["weighty.weight"],
        "norm-shifts": ["weighty.bias"],
        "other": ["activation.weight", "weight"],
    }


class SubclassedNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm((2, 4)),  # two-dimensional scale
        SubclassedNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_scale_and_shift_of_every_torch_norm_are_found(norm):
    assert own_kinds(norm) == {"weight": "norm-scales", "bias": "norm-shifts"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 1),
        nn.Conv1d(3, 4, 1),
        nn.ConvTranspose3d(3, 4, 1),
        nn.Bilinear(2, 3, 4),
        nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True),
        nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
        nn.GRUCell(3, 4),
        nn.LazyLinear(3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_weights_decay_and_biases_do_not(layer):
    kinds = own_kinds(layer)
    assert set(kinds) == {name for name, _ in layer.named_parameters(recurse=False)}
    for name, kind in kinds.items():
        assert kind == ("biases" if name.startswith("bias") or name.endswith("_bias") else "weights")


@pytest.mark.parametrize(
    "layer", [nn.Embedding(3, 4), nn.PReLU(), nn.RMSNorm(4)], ids=lambda layer: type(layer).__name__
)
def test_only_linear_maps_decay(layer):
    assert [group["weight_decay"] for group in param_groups(layer, lr=1.0, weight_decay=0.1)] == [0.0]


def test_every_parameter_stands_in_exactly_one_group_frozen_and_shared_ones_too():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7), NamesThatMislead())
    model[3].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    grouped = [p for group in param_groups(model, lr=1.0) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_shared_parameter_takes_the_kind_that_is_not_decayed():
    model = nn.Sequential(nn.Linear(4, 7), nn.Embedding(7, 4))
    model[0].weight = model[1].weight
    assert names(model) == {"other": ["0.weight"], "biases": ["0.bias"]}


def test_parametrized_weight_stays_a_weight_and_weight_norm_is_not_decayed():
    spectral = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)))
    assert names(spectral) == {"biases": ["0.bias"], "weights": ["0.parametrizations.weight.original"]}
    weight_norm = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)))
    assert names(weight_norm) == {
        "biases": ["0.bias"],
        "other": ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
    }


def test_learning_rate_factors_survive_deepcopy_and_pickle_and_follow_a_scheduler():
    model = NamesThatMislead()
    revisit(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD(param_groups(twin, lr=0.1), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        optimizer.step()
        schedule.step()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates.pop("norm-scales (lr x 0.01)") == pytest.approx(0.0005)
        assert set(rates.values()) == {0.05}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_groups_carry_rate_and_decay_for_any_optimizer(optimizer):
    groups = param_groups(NamesThatMislead(), lr=0.5, weight_decay=0.1)
    built = optimizer(groups).param_groups
    assert [group["lr"] for group in built] == [0.5] * 5
    assert {group["name"]: group["weight_decay"] for group in built} == {
        "weights": 0.1,
        "biases": 0.0,
        "norm-scales": 0.0,
        "norm-shifts": 0.0,
        "other": 0.0,
    }
