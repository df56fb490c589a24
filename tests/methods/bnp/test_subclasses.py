"""BNP preconditions subclasses of linear and convolution layers that compute what torch's do, and leaves the others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit


class Masked(nn.Linear):  # as in MADE, MAF, pruned-by-mask layers
    def forward(self, x):
        return F.linear(x, self.weight * torch.tensor([[1.0, 0, 0, 0]]), self.bias)


class MaskedByBuffer(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.int64).triu())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class NoisyInTraining(nn.Linear):
    def forward(self, x):
        noise = torch.randn_like(self.weight) if self.training else 0
        return F.linear(x, self.weight + noise, self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Logged(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.contiguous())


@pytest.mark.parametrize("cls", [Masked, MaskedByBuffer, NoisyInTraining, Activated])
def test_a_linear_layer_that_computes_something_else_steps_on_its_own_gradient(cls):
    model = nn.Sequential(cls(4, 1), nn.Linear(1, 1))
    bnp = normkit.BNP(model)
    assert list(bnp.skipped) == ["0"]
    assert f"{cls.__name__} transforms its weight or its output" in bnp.skipped["0"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bnp.attach(optimizer)
    model(torch.randn(64, 4) + 10).square().mean().backward()
    expected = [p.grad.clone() for p in model[0].parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model[0].parameters(), expected, strict=True))


def test_convolutions_are_judged_by_what_they_compute():
    model = nn.Sequential(Standardized(3, 4, 3), Logged(4, 4, 3))
    assert list(normkit.BNP(model).skipped) == ["0"]


def test_a_forward_set_on_the_instance_counts():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].forward = lambda x: F.linear(x, model[0].weight.abs())
    assert list(normkit.BNP(model).skipped) == ["0"]


class Rows(nn.Module):  # as PyTorch Geometric's Linear
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Columns(nn.Module):  # as the Conv1D of transformers
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Quadratic(Rows):
    def forward(self, x):
        return super().forward(x).square()


def test_layers_that_are_linear_are_known_whatever_their_type():
    model = nn.Sequential(Rows(4, 4), Columns(4, 4), Quadratic(4, 4), nn.Linear(4, 2))
    skipped = normkit.BNP(model).skipped
    assert "Rows is a linear layer but no torch.nn.Linear; replace it by one" in skipped["0"]
    assert "Columns is a linear layer but no torch.nn.Linear, and keeps its weight transposed" in skipped["1"]
    assert skipped["2"] == "Quadratic is not a linear or convolution layer"
    groups = {group["name"]: group["params"] for group in normkit.param_groups(model, lr=0.1, weight_decay=0.1)}
    assert [id(p) for p in groups["weights"]] == [id(model[i].weight) for i in (0, 1, 3)]
    assert [id(p) for p in groups["other"]] == [id(p) for p in model[2].parameters()]
