import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.functional import mse_loss

import normkit
from normkit.study.config import Training
from normkit.study.train.loop import prepare


def loss(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def trained(recipe, net, batch, training):
    model, optimizer = normkit.apply(recipe, copy.deepcopy(net), lr=0.1, batches=[batch[0]])
    network = prepare(training, model, loss)
    for _ in range(2):
        optimizer.zero_grad()
        network(batch, len(batch[0])).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within its compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler reads it, and hides the warning itself
def test_a_graph_does_not_serve_a_model_that_differs_by_its_hooks_alone():
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as torch starts
    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    batch = torch.randn(16, 5) * 3 + 2, torch.randn(16, 2)
    trained("none", net, batch, Training(compile=True))
    ours = trained("bnp", net, batch, Training(compile=True))
    torch.testing.assert_close(ours, trained("bnp", net, batch, Training()), rtol=1e-4, atol=1e-5)
