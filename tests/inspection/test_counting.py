"""Rows belong to the backward pass that fills ``.grad``: each fact on one layer, whose rows are named by numbers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normkit.inspection.counting import Collector, InputCounter, RowCounter, input_counters, is_counting, no_counting


class Counted(nn.Module):
    """A linear layer and a nonlinearity; its forward passes are numbered."""

    def __init__(self, collects=True):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.last = nn.Linear(3, 2), nn.Linear(2, 1)
        self.counters = [RowCounter(Collector("the method", "attach it", collects=collects)) for _ in range(2)]
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.linear(x)
        y = self.last(h.tanh())
        if torch.is_grad_enabled() and is_counting():
            self.counters[0].count(h, self.calls, self.linear.weight)
            self.counters[1].count(y, self.calls, self.last.weight)
        return y

    def take(self):
        first, last = (counter.take() for counter in self.counters)
        assert first == last
        return first


def x(**options):
    return torch.ones(4, 3, **options)


def test_a_forward_counts_once_a_backward_fills_its_weights_gradient():
    model = Counted()
    model(x())
    assert model.take() == []
    model(x()).sum().backward()
    model(x()).sum().backward()
    assert model.take() == [2, 3]
    assert model.take() == []


def test_several_backward_passes_through_one_forward_count_it_once():
    model = Counted()
    y = model(x())
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert model.take() == [1]


def test_forwards_that_measure_do_not_count():
    model = Counted()
    with no_counting():
        model(x()).sum().backward()
    with torch.no_grad():
        model(x())
    assert model.take() == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_counts_once(reentrant):
    model = Counted()
    checkpoint(model, x(requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert len(model.take()) == 1


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("value", [True, False], ids=["also the output", "the derivative alone"])
def test_a_gradient_inside_the_loss_does_not_consume_the_rows(late, value):
    model = Counted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        z = x(requires_grad=True)
        y = model(z)
        (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        if late:
            model.counters[0].discard()
            model.counters[1].discard()
            optimizer.zero_grad()
        (slope.square().sum() + (y.square().sum() if value else 0)).backward()
    assert model.take() == ([2] if late else [1, 2])


def test_a_gradient_that_is_only_looked_at_does_not_count():
    model = Counted()
    torch.autograd.grad(model(x()).sum(), list(model.parameters()))
    model(x()).sum().backward()
    assert model.take() == [2]


def test_gradients_that_are_assigned_count_the_rows_they_come_from():
    model = Counted()
    for p, g in zip(model.parameters(), torch.autograd.grad(model(x()).sum(), list(model.parameters())), strict=True):
        p.grad = g
    assert model.take() == [1]


def test_a_model_that_is_converted_there_and_back_counts_on():
    model = Counted()
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        model(x(dtype=dtype)).sum().backward()
        model.to(torch.float64).to(dtype)
        model.zero_grad()
    model(x()).sum().backward()
    assert model.take() == [4]


def test_inner_steps_of_maml_count_with_the_outer_backward():
    model = Counted()
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(model(x()).sum(), weights, create_graph=True)
    fast = {n: w - 0.1 * g for n, w, g in zip(names, weights, grads, strict=True)}
    outer = torch.func.functional_call(model, fast, x()).square().sum()
    outer.backward()
    assert sorted(model.take()) == [1, 2]


def test_rows_go_with_the_gradients_however_those_are_dropped():
    model = Counted()
    model(x()).sum().backward()
    model.zero_grad()
    model(x()).sum().backward()
    assert model.take() == [2]


def test_a_counter_whose_gradients_are_dropped_again_and_again_warns_once():
    layer, counter = nn.Linear(3, 2), RowCounter(Collector("the method", "attach it"))

    def run():
        output = layer(x())
        counter.count(output, 1, layer.weight)
        output.sum().backward()
        layer.zero_grad()

    for _ in range(7):
        run()
    with pytest.warns(UserWarning, match="the method: 8 backward passes, each followed by zero_grad, and no step"):
        run()
    for _ in range(9):
        run()


def test_accumulation_over_many_micro_batches_does_not_warn():
    model = Counted()
    for _ in range(20):
        model(x()).sum().backward()
    assert len(model.take()) == 20


def test_of_a_layer_that_nobody_collects_nothing_is_kept():
    model = Counted(collects=False)
    for _ in range(7):
        model(x()).sum().backward()
    with pytest.warns(UserWarning, match="8 backward passes, and no optimizer is attached.*attach it"):
        model(x()).sum().backward()
    assert model.take() == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_starts_without_rows_and_counts_once_it_is_claimed(how):
    model, collector = nn.Linear(3, 2), Collector("the method", "attach it")
    counter = RowCounter(collector)
    output = model(x())
    counter.count(output, 1, model.weight)
    output.sum().backward()
    twin, theirs = how((counter, collector))
    assert twin.collector is theirs
    assert theirs.copied
    assert not theirs.collects
    theirs.claim()
    assert (twin.take(), counter.take()) == ([], [1])


class Sizes(InputCounter):
    def _after_forward(self, layer, args, kwargs, output):
        self.count(output, len(args[0]), layer.weight)


def test_a_counter_that_came_along_with_a_copied_layer_makes_way_for_a_new_one():
    layer = nn.Linear(3, 2)
    original = Sizes(Collector("the method", "attach it"))
    original.watch(layer)
    twin = copy.deepcopy(layer)
    (along,) = input_counters(twin)
    assert along is not original
    with pytest.warns(UserWarning, match="the method: this copy of a model is trained without the optimizer"):
        twin(x()).sum().backward()
    mine = Sizes(Collector("the method", "attach it"))
    mine.watch(twin)
    twin(x()).sum().backward()
    assert input_counters(twin) == [mine]
    assert (mine.take(), original.take()) == ([4], [])
