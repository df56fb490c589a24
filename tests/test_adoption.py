"""How much of a model a method reaches: the table of ``describe``, the line that ``apply`` logs, its warnings, and the handle."""

import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR

import normkit


class OwnLinear(nn.Module):
    """A linear layer that is none of torch's, as many libraries have."""

    def __init__(self, features_in, features_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_out, features_in))

    def forward(self, x):
        return x @ self.weight.T


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU()),
        *(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
    )


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 2, 4, 4)).square().mean().backward()
    optimizer.step()


REPLACED = "2 of 2 normalization layers replaced"
EFFECTS = {
    "batch": [],
    "bnp": [REPLACED, "3 of 4 modules with weights preconditioned (147 of 148 values)"],
    "batchless": [REPLACED, "2 of 2 batchless layers fitted"],
    "group": [REPLACED],
    "sgd-g": ["2 of 3 weights on the sphere (88 of 136 values)"],
    "revisited": ["2 of 2 marked parameters at the learning rate of the method"],
}


@pytest.mark.parametrize("name", EFFECTS)
def test_apply_logs_one_line_that_says_what_the_method_reaches(name, caplog):
    with caplog.at_level(logging.INFO, "normkit"):
        model, optimizer = normkit.apply(name, network(), lr=0.1)
    (line,) = (record.message for record in caplog.records if record.levelno == logging.INFO)
    described = normkit.describe(model, optimizer)
    assert line == f"{name}: {described.summary}"
    assert [str(e) for e in described.effects if e.verb != "trained"] == EFFECTS[name]
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (trained,) = (e for e in described.effects if e.verb == "trained")
    assert trained.elements == (values, values)
    assert not trained.left


def test_what_is_left_alone_is_named_with_the_reason():
    table = str(normkit.describe(*normkit.apply("bnp", network(), lr=0.1)))
    assert "  left: 2: PReLU is not a linear or convolution layer\n" in table
    table = str(normkit.describe(*normkit.apply("sgd-g", network(), lr=0.1)))
    assert "  left: 7.weight: reaches the output of the model" in table
    model = network()
    table = str(normkit.describe(model, SGD(model[0].parameters(), lr=0.1)))
    assert table.startswith("trained  1 of 9 parameters  72 of ")
    assert "\n  left: 7.bias: not in the optimizer\n" in table


def test_layers_chosen_by_where_are_counted_and_not_warned_of():
    model, optimizer = normkit.apply("batchless", network(), lr=0.1, where=["1"])
    replaced, _, fitted = normkit.describe(model, optimizer).effects
    assert (replaced.done, replaced.left) == (("1",), {"4": "stays BatchNorm2d"})
    assert fitted.done == ("1",)


def test_a_method_that_reaches_little_warns():
    layers = [layer for _ in range(6) for layer in (OwnLinear(8, 8), nn.ReLU())]
    with pytest.warns(
        UserWarning, match=r"bnp does little here: 1 of 7 modules with weights preconditioned \(18 of 402 val"
    ):
        normkit.apply("bnp", nn.Sequential(*layers, nn.Linear(8, 2)), lr=0.1)


def test_an_optimizer_without_the_rates_of_the_method_warns():
    def flat(groups):
        return SGD([p for group in groups for p in group["params"]], lr=0.1)

    with pytest.warns(
        UserWarning, match=r"revisited does little here: 0 of 2 marked.*is 0\.1 and should be 0\.01 times"
    ):
        normkit.apply("revisited", network(), lr=0.1, optimizer=flat)


@pytest.mark.parametrize("name", ["revisited", "sgd-g"])
@pytest.mark.parametrize("how", ["OneCycleLR", "CyclicLR", "loop"])
def test_one_rate_for_all_groups_is_noticed_once(name, how):
    model, optimizer = normkit.apply(name, network(), lr=0.1)
    step(model, optimizer)
    if how == "OneCycleLR":
        OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    elif how == "CyclicLR":
        CyclicLR(optimizer, base_lr=0.01, max_lr=0.1)
    else:
        for group in optimizer.param_groups:
            group["lr"] = 0.05
    with pytest.warns(UserWarning, match=r"learning rates .* set all of them to 0\.\d+, which undoes the method"):
        step(model, optimizer)
    step(model, optimizer)


@pytest.mark.parametrize("name", ["revisited", "sgd-g", "batch"])
def test_schedules_that_keep_the_ratios_are_left_in_peace(name, recwarn):
    model, optimizer = normkit.apply(name, network(), lr=0.1)
    schedules = [
        OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=3),
        CosineAnnealingLR(optimizer, 3),
    ]
    for schedule in schedules:
        for _ in range(3):
            step(model, optimizer)
            schedule.step()
    assert not recwarn


def test_the_handle_gives_the_bnp_that_apply_attached():
    model, optimizer = normkit.apply("bnp", network(), lr=0.1)
    bnp = normkit.handle(optimizer)
    assert bnp.skipped == {"2": "PReLU is not a linear or convolution layer"}
    with bnp.masked(torch.zeros(8, 4, 4)):
        model(torch.randn(8, 2, 4, 4)).square().mean().backward()
    bnp.precondition_()
    optimizer.step()
    with pytest.raises(ValueError, match=r"another BNP observes this layer.*normkit\.handle\(optimizer\)"):
        normkit.apply("bnp", model, lr=0.1)
    bnp.remove()
    normkit.apply("bnp", normkit.revert(model), lr=0.1)


def test_the_handle_of_other_methods_takes_them_off():
    model, optimizer = normkit.apply("batchless", network(), lr=0.1)
    normkit.handle(optimizer).remove()
    with pytest.raises(ValueError, match="no method is attached to this SGD"):
        normkit.handle(optimizer)
    normkit.attach(model, optimizer)
    with pytest.raises(ValueError, match="no method is attached to this Adam"):
        normkit.handle(Adam(model.parameters()))
