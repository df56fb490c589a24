"""torch.compile tells models apart that differ by their hooks alone."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.functional import mse_loss

import normkit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # the compiler reads it, and hides the warning itself
]


@pytest.fixture(autouse=True)
def torch_as_it_starts():
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(recipe, net, x, y, *, compiled):
    model, optimizer = normkit.apply(recipe, copy.deepcopy(net), lr=0.1, batches=[x])
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(3):
        optimizer.zero_grad()
        mse_loss(forward(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("plain", "hooked"), [("none", "bnp"), ("batchless", "batchless-projected")])
def test_the_graph_of_one_method_does_not_serve_another_that_differs_by_its_hooks_alone(plain, hooked):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
    x, y = (torch.randn(16, 5) * 3 + 2).double(), torch.randn(16, 2).double()
    for recipe in (plain, hooked, plain, hooked):
        torch.testing.assert_close(
            trained(recipe, net, x, y, compiled=True), trained(recipe, net, x, y, compiled=False), rtol=1e-9, atol=1e-12
        )


def test_a_model_that_was_compiled_and_run_before_it_is_observed_is_observed_from_then_on():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = (torch.randn(16, 5) * 3 + 2).double()
    forward = torch.compile(net, backend="aot_eager")
    forward(x)
    bnp = normkit.BNP(net)
    bnp.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    forward(x).sum().backward()
    bnp.precondition_()
    assert all(entry["steps"] == 1 for entry in bnp.state_dict().values())
