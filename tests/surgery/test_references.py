"""A replaced layer is replaced wherever a model refers to it, or it stays and is named."""

import dataclasses
import types
from collections import OrderedDict, deque, namedtuple
from functools import partial

import pytest
import torch
from torch import nn

import normkit


@dataclasses.dataclass
class Stage:
    conv: nn.Module
    norm: nn.Module


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenStage:
    conv: nn.Module
    norm: nn.Module


Pair = namedtuple("Pair", "conv norm")


def closure(norm):
    def call(x):
        return norm(x)

    return call


# how a model may keep a convolution and the norm behind it, and how it runs what it keeps
HELD = {
    "list": (lambda conv, norm: [conv, norm], lambda held, x: held[1](held[0](x))),
    "list of pairs": (lambda conv, norm: [(conv, norm)], lambda held, x: held[0][1](held[0][0](x))),
    "nested": (lambda conv, norm: {"a": [({"n": norm},)], "c": conv}, lambda h, x: h["a"][0][0]["n"](h["c"](x))),
    "deque": (lambda conv, norm: deque([conv, norm]), lambda held, x: held[1](held[0](x))),
    "key": (lambda conv, norm: {norm: 1, conv: 0}, lambda held, x: next(iter(held))([*held][1](x))),
    "ordered dict": (lambda conv, norm: OrderedDict(c=conv, n=norm), lambda held, x: held["n"](held["c"](x))),
    "dataclass": (Stage, lambda held, x: held.norm(held.conv(x))),
    "frozen dataclass with slots": (FrozenStage, lambda held, x: held.norm(held.conv(x))),
    "named tuple": (Pair, lambda held, x: held.norm(held.conv(x))),
    "namespace": (lambda c, n: types.SimpleNamespace(conv=c, norm=n), lambda held, x: held.norm(held.conv(x))),
    "partial": (lambda conv, norm: (conv, partial(norm)), lambda held, x: held[1](held[0](x))),
    "partial of a method": (lambda conv, norm: (conv, partial(norm.forward)), lambda held, x: held[1](held[0](x))),
    "bound method": (lambda conv, norm: (conv, norm.forward), lambda held, x: held[1](held[0](x))),
    "closure": (lambda conv, norm: (conv, closure(norm)), lambda held, x: held[1](held[0](x))),
}


class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        hold, self.run = HELD[how]
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.held = hold(self.conv, self.norm)

    def forward(self, x):
        return self.run(self.held, x)


def trained(how):
    torch.manual_seed(0)
    model, x = Net(how).double(), torch.randn(8, 3, 7, 7, dtype=torch.float64) * 2 + 1
    for _ in range(3):
        model(x)
    return model, x


@pytest.mark.parametrize("how", HELD)
def test_the_layer_that_runs_is_the_one_that_was_put_in(how):
    model, x = trained(how)
    normkit.convert(model, "group")
    expected = model.norm(model.conv(x))
    assert type(model.norm) is nn.GroupNorm
    assert torch.equal(model(x), expected)
    normkit.revert(model)
    assert torch.equal(model(x), model.norm(model.conv(x)))
    assert type(model.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("how", HELD)
@pytest.mark.filterwarnings("ignore:fold. 1 layer stays")
def test_fold_keeps_the_function_however_the_model_keeps_its_layers(how):
    model, x = trained(how)
    folded = normkit.fold(model.eval())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_copy_shares_its_closures_so_what_they_hold_is_not_folded():
    model, _ = trained("closure")
    with pytest.warns(UserWarning, match="a function of the model refers to it, which a copy of the model shares"):
        normkit.fold(model.eval())


@pytest.mark.parametrize("how", HELD)
def test_a_recipe_that_raises_puts_back_what_every_reference_refers_to(how):
    model, x = trained(how)
    expected = model.eval()(x)
    with pytest.raises(ZeroDivisionError):
        normkit.apply("group", model, lr=0.1, optimizer=lambda groups: 1 // 0)
    assert torch.equal(model(x), expected)


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")

    def __reduce__(self):
        return Frozen, (dict(self),)


def test_a_layer_in_a_container_that_may_not_be_written_to_stays_and_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model.config = Frozen(norms=(model[1],))
    with pytest.warns(
        UserWarning, match="^1: stays as it is, since a container that may not be written to refers to it"
    ):
        normkit.convert(model, "none")
    assert [type(layer).__name__ for layer in model] == ["Conv2d", "BatchNorm2d", "Conv2d", "Removed"]
    with pytest.warns(
        UserWarning, match=r"fold: 1 layer stays. 1 \(BatchNorm2d\): a container that may not be written"
    ):
        folded = normkit.fold(model.eval())
    assert folded.config["norms"][0] is folded[1]


def test_a_container_that_may_not_be_written_to_and_holds_no_layer_does_not_matter():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.config = Frozen(a=1)
    assert type(normkit.convert(model, "group")[1]) is nn.GroupNorm
    assert type(normkit.revert(model)[1]) is nn.BatchNorm2d


def test_long_chains_of_objects_are_walked():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.chain = types.SimpleNamespace(next=None, norm=model[1])
    for _ in range(5000):
        model.chain = types.SimpleNamespace(next=model.chain)
    normkit.convert(model, "group")
    end = model.chain
    while end.next is not None:
        end = end.next
    assert end.norm is model[1]
