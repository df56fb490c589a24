"""Models that keep state, share weights or drop units in their own way are measured as they are, and left as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import normkit
from normkit import instruments


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(features=4, classes=3, size=16):
    return torch.randn(size, features), torch.randint(0, classes, (size,))


class Drifting(nn.Module):
    """Keeps a mean in a buffer, in place or by assignment."""

    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = nn.Linear(4, 3).double(), in_place
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        y = self.linear(x.double())
        new = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        if self.in_place:
            self.mean.copy_(new)
        else:
            self.mean = new
        return y - self.mean


def test_an_assigned_buffer_starts_anew_at_every_evaluation():
    data, found = batch(), []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = Drifting(in_place)
        measured = instruments.curvature(model, loss, data, power_iterations=10, trace_samples=2)
        found.append((measured.directional, measured.whole.lambda_max, measured.whole.trace))
        assert not model.mean.any()
    assert found[0] == found[1]


class Caching(nn.Linear):
    """A table in a buffer that grows with the batch, and a number that says how far."""

    length = 0

    def forward(self, x):
        if len(x) > self.length:
            self.length = len(x)
            self.register_buffer("table", torch.zeros(self.length, 1))
        return super().forward(x) + self.table[: len(x)]


def test_a_cache_and_the_number_beside_it_come_back_together():
    model = nn.Sequential(Caching(4, 3))
    model(torch.randn(3, 4))
    instruments.landscape(model, loss, batch(), lr=1.0)
    assert (model[0].length, len(model[0].table)) == (3, 3)
    model(torch.randn(16, 4))


def test_a_pruned_weight_comes_back():
    model = nn.Sequential(nn.Linear(4, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    weight = model[0].weight.clone()
    instruments.landscape(model, loss, batch(), lr=1.0)
    assert torch.equal(model[0].weight, weight)


def test_the_monitor_follows_tied_weights_and_leaves_filters_of_zeros_out():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm1d(4), nn.ReLU(), second, nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        first.weight[0] = 0
    with instruments.Monitor(model, loss, optimizer, 1) as monitor:
        data = batch(classes=4)
        value = loss(model, data)
        value.backward()
        monitor.observe(data, value)
        optimizer.step()
    assert all(0 < layer["angle"] < 3 for layer in monitor.history[-1]["angular"].values())


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        z = F.dropout(self.norm(self.linear(x)).relu(), 0.5, self.training)[None]
        return self.head(
            z + F.scaled_dot_product_attention(z, z, z, None, 0.5 * self.training) + self.attention(z, z, z)[0]
        )[0]


def test_dropout_functions_are_off_where_dropout_is():
    model, data = Dropping(), batch(size=512)
    model.norm.momentum = None
    for _ in range(3):
        model(data[0])  # statistics of these inputs
    with_it, without = (instruments.discrepancy(model, loss, data, dropout=on).divergence for on in (True, False))
    assert without < 1e-4 < with_it
    assert model.attention.dropout == 0.5


def test_dropping_of_another_kind_is_not_blamed_on_a_normalization():
    class Stochastic(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return 8 * y * torch.empty(len(y), 1).bernoulli_(0.5) if self.training else 4 * y

    model = nn.Sequential(Stochastic(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16, momentum=None)), nn.Linear(16, 3))
    data = batch(size=256)
    for _ in range(3):
        model(data[0])
    (finding,) = (
        f for f in normkit.doctor(model, loss, [data]).findings if f.disease == "train and eval mode disagree"
    )
    assert list(finding.layers) == [""]
    assert "by hand" in finding.remedy


def test_a_norm_that_never_runs_does_not_hide_that_the_modes_disagree():
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    model.append(nn.Identity())
    model[3].unused = nn.BatchNorm1d(5)
    model[1].running_mean.fill_(3.0)
    data = batch(size=256)
    assert "train and eval mode disagree" in [found.disease for found in normkit.doctor(model, loss, [data]).findings]


def test_outputs_of_a_regression_are_no_scores_of_classes():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    found = instruments.discrepancy(
        model, lambda m, b: F.mse_loss(m(b[0]), b[1]), (torch.randn(8, 4), torch.randn(8, 3))
    )
    assert found.divergence is None


@pytest.mark.parametrize(("shape", "dim"), [((8, 5), 1), ((8, 3), -1)])
def test_the_targets_tell_which_dimension_holds_the_classes(shape, dim):
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(8, 3, 5)
    targets = torch.zeros(shape, dtype=torch.long)
    found = instruments.discrepancy(model, lambda m, b: m(b[0]).square().mean(), (x, targets))
    q, p = (output.double().log_softmax(dim) for output in (model.eval()(x), model.train()(x)))
    assert found.divergence == pytest.approx((p.exp() * (p - q)).sum(dim).mean().item())


def test_covariate_shift_counts_the_projection_that_attention_never_calls():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
            self.unused = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0]).mean(1)

    model, data = Attending(), (torch.randn(8, 5, 4), torch.randint(0, 3, (8,)))
    before = instruments.snapshot(model)
    with torch.no_grad():
        model.attention.out_proj.weight.add_(1.0)
    layers = {found.layer: found for found in instruments.covariate_shift(model, loss, data, before).layers}
    assert list(layers) == ["attention", "head"]
    assert layers["head"].difference > 0


def test_the_doctor_steps_no_optimizer_and_moves_no_random_state():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    calls = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    x, y = batch()
    loader = DataLoader(TensorDataset(x.requires_grad_(), y), 8, shuffle=True)
    state = torch.get_rng_state()
    normkit.doctor(model, loss, loader)
    normkit.doctor(model, loss, [(x, y)])
    instruments.conditioning(model, loss, loader)
    assert torch.equal(state, torch.get_rng_state())
    assert not calls
    assert x.grad is None


def test_an_objective_without_an_eval_mode_is_examined_in_train_mode(caplog):
    def only_training(model, data):
        if not model.training:
            raise TypeError("predictions")
        return loss(model, data)

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.5), nn.Linear(8, 3))
    model(batch()[0])
    shifted = [batch(), *((x + 100, y) for x, y in (batch(size=64), batch(size=64)))]  # later batches are examined, too
    found = normkit.doctor(model, only_training, shifted)
    assert "running statistics far from the batches" in str([finding.disease for finding in found.findings])
    assert "bias before batch normalization" in [finding.disease for finding in found.findings]
    assert "train and eval mode are not compared, since the objective in eval mode raised TypeError" in caplog.text


def test_the_gradient_removed_in_half_precision_is_a_share_and_of_the_last_call():
    model, data = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)), batch(64)
    images = (data[0].view(-1, 1, 8, 8), data[1])

    def half(model, data):
        with torch.autocast("cpu", dtype=torch.float16):
            return loss(model, data) * 1e-3

    exact = instruments.gradient_removed(model, lambda m, b: loss(m, b) * 1e-3, images).layers["1"]
    assert instruments.gradient_removed(model, half, images).layers["1"] == pytest.approx(exact, rel=0.05)
    norm = nn.Sequential(nn.BatchNorm1d(4))
    first, last = torch.randn(2, 16, 4).double()
    alone = instruments.gradient_removed(norm.double(), lambda m, b: m(b).pow(3).sum(), last).channels["0"]
    both = instruments.gradient_removed(norm, lambda m, b: m(first).pow(4).sum() + m(b).pow(3).sum(), last).channels[
        "0"
    ]
    assert both == pytest.approx(alone)


def test_complex_weights_are_pairs_of_real_ones():
    class Complex(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, x):
            return (x.to(torch.complex128) @ torch.view_as_complex(self.pair())).abs()

        def pair(self):
            return torch.view_as_real(self.weight) if self.weight.is_complex() else self.weight

    weight, data = torch.randn(4, 3, dtype=torch.complex128), batch()
    found = [
        instruments.curvature(Complex(w), loss, data, power_iterations=200)
        for w in (weight, torch.view_as_real(weight))
    ]
    assert found[0].directional == pytest.approx(found[1].directional, rel=1e-6)
    assert found[0].whole.lambda_max == pytest.approx(found[1].whole.lambda_max, rel=1e-3)
    landscapes = [instruments.landscape(Complex(w), loss, data, lr=0.1) for w in (weight, torch.view_as_real(weight))]
    assert landscapes[0].gradient_norm == pytest.approx(landscapes[1].gradient_norm)


def test_sparse_gradients_are_watched():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randint(0, 10, (8, 2)), torch.randint(0, 3, (8,))
    with instruments.Monitor(model, loss, optimizer, 1) as monitor:
        value = loss(model, data)
        value.backward()
        monitor.observe(data, value)
        optimizer.step()
    dense = [p.grad.to_dense().norm() for p in model.parameters()]
    assert monitor.history[-1]["gradient_norm"] == pytest.approx(torch.stack(dense).norm().item())


def test_preconditioners_of_a_wrapped_model_are_found_and_unknown_ones_named():
    net, data = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), batch()
    model, optimizer = normkit.apply("bnp", nn.DataParallel(net), lr=0.1)
    loss(model, data).backward()
    optimizer.step()
    given = normkit.handle(optimizer).preconditioners()
    layers = instruments.conditioning(model, loss, [data], preconditioners=given).layers
    assert all(layer.preconditioned for layer in layers)
    with pytest.raises(ValueError, match=r"preconditioners: \['9'\] are no linear or convolution layers"):
        instruments.conditioning(model, loss, [data], preconditioners={"9": given["module.0"]})
