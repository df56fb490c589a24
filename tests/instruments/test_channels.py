"""Channel states, activations and train/eval discrepancy against their definitions."""

import math

import pytest
import torch
from torch import nn

from normkit.instruments import activations, channels, discrepancy
from normkit.methods.lp_norm import LpNorm1d
from tests.cases import batch_loss


def mean_output(model, batch):
    return model(batch).mean()


def test_drift_is_the_divergence_of_two_gaussians():
    norm = nn.BatchNorm1d(2, eps=1e-30).double()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[3.0, 1.0], [5.0, -1.0]], dtype=torch.float64)  # batch: mean (4, 0), variance (1, 1)
    found = channels(nn.Sequential(norm), mean_output, x).layers[0]
    assert found.shift == pytest.approx([1.5, 0.0])
    batch, running = (torch.distributions.Normal(m, s) for m, s in ((4.0, 1.0), (1.0, 2.0)))
    expected = torch.distributions.kl_divergence(batch, running).item()
    assert found.divergence == pytest.approx([expected, 0.0], abs=1e-6)
    assert found.mean_divergence == pytest.approx(expected / 2, rel=1e-6)


def test_share_of_positive_outputs_is_that_of_a_gaussian():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -0.5]))
    found = channels(nn.Sequential(norm), mean_output, torch.randn(20000, 3) * 3 + 1).layers[0]
    expected = [0.5 * (1 + math.erf(r / math.sqrt(2))) for r in (0.0, 0.5, -1.0)]
    assert found.expected_positive == pytest.approx(expected, rel=1e-6)
    assert found.positive == pytest.approx(expected, abs=0.02)


def test_dead_always_on_and_eps_dominated_channels_are_found():
    norm = nn.BatchNorm1d(4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([-100.0, 100.0, 0.0, 0.1]))
    x = torch.randn(64, 4)
    x[:, 3] *= 1e-4
    found = channels(nn.Sequential(norm, nn.ReLU()), mean_output, x).layers[0]
    assert found.dead == (0,)
    assert found.always_on[0] == 1
    assert found.eps_dominated == (3,)
    assert found.eps_share[3] == pytest.approx(1e-5 / (x[:, 3].var(correction=0).item() + 1e-5), rel=1e-4)


def test_only_channels_that_a_relu_takes_can_be_dead():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)
            self.free = nn.Linear(1, 1)

        def forward(self, x):
            return self.free(torch.relu(x + self.norm(x)))

    net = Residual()
    nn.init.constant_(net.norm.bias, -100.0)
    (found,) = channels(net, mean_output, torch.randn(16, 1)).layers
    assert found.positive == (0.0,)
    assert not found.dead


def test_a_net_without_normalization_shows_its_dead_channels():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    nn.init.constant_(net[0].bias, -100.0)
    (found,) = channels(net, mean_output, torch.randn(16, 2)).layers
    assert (found.layer, found.dead) == ("0", (0, 1, 2))


def test_lp_normalization_drifts_by_its_own_statistics():
    norm = LpNorm1d(1, 1, eps=0.0)
    found = channels(nn.Sequential(norm), mean_output, torch.tensor([[1.0], [3.0]])).layers[0]
    assert found.shift == (2.0,)
    assert found.divergence[0] == pytest.approx((4 + 4 - 1 - math.log(4)) / 2)


def test_activations_and_their_drift():
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    first = activations(net, mean_output, x)
    assert first.means == {"0": (2.0, 4.0)}
    assert first.variances == {"0": (1.0, 4.0)}
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert activations(net, mean_output, x).drift(first) == {"0": (3.0, 7.5)}


def test_discrepancy_is_that_of_the_two_modes_and_names_the_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.BatchNorm1d(5))
    batch = torch.randn(32, 4), torch.randint(5, (32,))
    for _ in range(200):
        net(batch[0])
    net[1].running_mean += 3.0  # the disease
    found = discrepancy(net, batch_loss, batch)
    with torch.no_grad():
        train, evaluation = net(batch[0]), net.eval()(batch[0])
    p = train.log_softmax(1)
    assert found.train_loss == pytest.approx(nn.functional.cross_entropy(train, batch[1]).item(), rel=1e-5)
    assert found.eval_loss == pytest.approx(nn.functional.cross_entropy(evaluation, batch[1]).item(), rel=1e-5)
    assert found.divergence == pytest.approx((p.exp() * (p - evaluation.log_softmax(1))).sum(1).mean().item(), rel=1e-4)
    assert found.flips == (train.argmax(1) != evaluation.argmax(1)).float().mean().item()
    by_layer = {layer.layer: layer for layer in found.layers}
    assert by_layer["0"].output == 0
    assert by_layer["1"].local > 0.5
    assert by_layer["4"].local < 0.2  # not the cause ...
    assert by_layer["4"].output > 0.1  # ... but it suffers


def test_dropout_is_a_discrepancy_unless_left_out():
    net = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    assert {layer.layer: layer.local for layer in discrepancy(net, batch_loss, batch).layers}["1"] > 0.3
    found = discrepancy(net, batch_loss, batch, dropout=False)
    assert found.train_loss == found.eval_loss


def test_layers_kept_in_eval_mode_stay_there():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    net[1].eval()
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    found = discrepancy(net, batch_loss, batch)
    assert found.flips == 0
    assert not net[1].training
