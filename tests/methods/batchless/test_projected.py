"""The projection of the weights' gradients in front of batchless layers against batch normalization, in float64."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from normkit.functional import projected_weight_gradient
from normkit.inspection.counting import Collector
from normkit.methods.batchless import layer as batchless_layer
from normkit.methods.batchless import one_pass
from normkit.methods.batchless import weights as batchless_weights
from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d
from normkit.methods.batchless.projection import Feeding, Projection
from normkit.methods.kernels import choice
from normkit.methods.kernels.compiled import has_compiler
from normkit.optim import weight_rows

LAYERS = [
    (nn.Linear(6, 4), (60, 6)),
    (nn.Conv1d(6, 4, 1, groups=2), (30, 6, 2)),
    (nn.Conv2d(6, 4, 3, padding=1), (5, 6, 4, 4)),
    (nn.Conv2d(6, 4, 3, groups=2), (5, 6, 4, 4)),
]


def projected_by_the_step(layer, x, coefficients):
    """The layer's gradient after its optimizer's step, in front of a projected layer with the batch's own statistics."""
    norm = {2: BatchlessNorm1d, 3: BatchlessNorm1d, 4: BatchlessNorm2d}[x.dim()](4, projected=True, eps=0.0)
    model = nn.Sequential(layer, norm).double()
    normkit.initialize(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    normkit.attach(model, optimizer)
    optimizer.zero_grad()
    (model(x) * coefficients).sum().backward()
    optimizer.step()
    return layer.weight.grad.clone()


def whitened(shape):
    """Rows of mean exactly 0 and covariance exactly the identity."""
    x = torch.randn(shape).double().movedim(1, -1)
    flat = x.reshape(-1, shape[1])
    flat = torch.linalg.qr(flat - flat.mean(0))[0] * len(flat) ** 0.5
    return flat.view(x.shape).movedim(-1, 1)


@pytest.mark.parametrize(("layer", "shape"), LAYERS[:2])
def test_weights_of_centered_uncorrelated_inputs_get_batch_normalizations_gradient(layer, shape):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer).double(), whitened(shape)
    coefficients = torch.randn_like(layer(x))
    bn = nn.Sequential(copy.deepcopy(layer), nn.BatchNorm1d(4, eps=1e-30)).double()
    (bn(x) * coefficients).sum().backward()
    torch.testing.assert_close(projected_by_the_step(layer, x, coefficients), bn[0].weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_steps_gradient_scales_no_filter(layer, shape):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape).double() + 1
    weight = layer.weight.detach().clone()
    grad = projected_by_the_step(layer, x, torch.randn_like(layer(x)))
    assert (grad * weight).flatten(1).sum(1).abs().max() < 1e-12
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize(("layer", "_"), LAYERS)
def test_the_weights_gradient_is_the_formula_filter_by_filter(layer, _):
    torch.manual_seed(0)
    grad, weight = torch.randn_like(layer.weight).double(), torch.randn_like(layer.weight).double()
    mean, variance = torch.randn(6).double(), torch.rand(6).double()
    groups, (outs, ins, *taps) = getattr(layer, "groups", 1), weight.shape
    got = projected_weight_gradient(grad, weight, mean, variance, groups=groups)
    for out in range(outs):
        first = out // (outs // groups) * ins
        per_tap = [t[first : first + ins].reshape(ins, *[1] * len(taps)).expand(ins, *taps) for t in (mean, variance)]
        (m, s), g, w = (t.flatten() for t in per_tap), grad[out].flatten(), weight[out].flatten()
        g = g - m * (g @ m) / (m @ m + (m * m) @ s / (m @ m))
        g = g - w * (g @ w) / (w @ w)
        torch.testing.assert_close(got[out].flatten(), g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "_"), LAYERS)
def test_of_a_constant_gradient_next_to_nothing_is_left_where_inputs_are_far_from_zero(layer, _):
    torch.manual_seed(0)
    weight, mean = torch.randn_like(layer.weight).double(), torch.full((6,), 10.0).double()
    constant = torch.randn(4, *[1] * (weight.dim() - 1)).double()
    grad = constant * torch.full_like(weight, 10)  # the sum over rows of a constant times h
    got = projected_weight_gradient(grad, weight, mean, torch.ones_like(mean), groups=getattr(layer, "groups", 1))
    assert got.abs().max() < 0.01 * grad.abs().max()


def test_statistics_that_are_not_finite_take_nothing_out_along_the_mean():
    model = Fed()
    (feeding,) = batchless_weights.feeding_layers(model, Collector("the test", "collect"))
    model(torch.randn(5, 4)).square().sum().backward()
    grad = model.layer.weight.grad.clone()
    *_, along = feeding.take_sums()
    overflowed, none = torch.full((4, 2), torch.inf), torch.zeros(4)
    batchless_weights.WeightProjection([feeding])([(torch.tensor(10.0), overflowed, along)], ranks=1)
    expected = projected_weight_gradient(grad, model.layer.weight.detach(), none, none)
    torch.testing.assert_close(model.layer.weight.grad, expected, rtol=1e-5, atol=1e-6)
    assert (expected - grad).abs().max() > 0.01  # what scales the filters is gone


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("largest", "joined"), [(1 << 22, 1 << 14), (300, 1 << 14), (1 << 22, 0)])
@pytest.mark.parametrize(("dtype", "switch"), [(torch.float64, ""), (torch.float64, "0"), (torch.bfloat16, "")])
def test_weights_that_are_projected_together_are_each_projected_as_if_alone(
    monkeypatch, dtype, switch, largest, joined, memory_format
):
    monkeypatch.setattr(choice, "chosen", switch)
    monkeypatch.setattr(weight_rows, "LARGEST_BATCH", largest)
    monkeypatch.setitem(weight_rows._JOINED, "cpu", joined)
    torch.manual_seed(0)
    shapes = [((4, 6), 1), *3 * [((8, 4, 3, 3), 2)], ((6, 1, 3, 3), 6), ((8, 4, 3, 3), 1), ((4, 6), 1), ((4, 3, 2), 2)]
    project = Projection()
    for _ in range(2):
        grads, weights = ([torch.randn(shape).to(dtype) for shape, _ in shapes] for _ in range(2))
        grads = [t.to(memory_format=memory_format) if t.dim() == 4 else t for t in grads]
        sizes = [shape[1] * groups for shape, groups in shapes]
        mean, variance = torch.randn(sum(sizes)).double(), torch.rand(sum(sizes)).double()
        mean[:6] = 0
        weights[-1].zero_()
        expected = [
            projected_weight_gradient(g.double(), w.double(), m, s, groups=groups).to(dtype)
            for g, w, m, s, (_, groups) in zip(
                grads, weights, mean.split(sizes), variance.split(sizes), shapes, strict=True
            )
        ]
        kept = list(grads)
        sums = torch.stack((mean, variance + mean.square()), 1).split(sizes)
        rows = torch.ones((), dtype=torch.float64)
        project([Feeding(g, w, n, rows, s) for g, w, (_, n), s in zip(grads, weights, shapes, sums, strict=True)])
        for got, want, before in zip(grads, expected, kept, strict=True):
            assert got is before
            # float32 is rounded to bfloat16 once more than float64
            torch.testing.assert_close(got, want, rtol=1e-12 if dtype == torch.float64 else 2**-7, atol=1e-12)


def test_the_scale_of_a_loss_scales_the_weights_gradient():
    torch.manual_seed(0)
    grad, weight, mean, variance = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6), torch.rand(6)
    once, often = (projected_weight_gradient(scale * grad, weight, mean, variance) for scale in (1, 2.0**16))
    assert torch.equal(2.0**16 * once, often)


class Fed(nn.Module):
    """A projected layer behind a linear one, which is called by keyword, and a head."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.norm = BatchlessNorm1d(4, projected=True)

    def forward(self, x):
        return self.head(self.norm(self.layer(input=x)))


def stepped(model, x):
    """Gradients of the layer's weight before and in the step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    normkit.attach(model, optimizer)
    model(x).square().sum().backward()
    before = model.layer.weight.grad.clone()
    optimizer.step()
    return before, model.layer.weight.grad


def test_a_layer_called_by_keyword_is_projected_too():
    torch.manual_seed(0)
    model, x = Fed().double(), torch.randn(5, 4).double() + 1
    weight = model.layer.weight.detach().clone()
    before, after = stepped(model, x)
    variance, mean = torch.var_mean(x, 0, correction=0)
    expected = projected_weight_gradient(before, weight, mean, variance)
    restraint = after.norm() / expected.norm()
    torch.testing.assert_close(after, restraint * expected, rtol=1e-10, atol=1e-12)


def test_a_weight_that_another_layer_shares_keeps_the_direction_of_its_gradient():
    torch.manual_seed(0)
    model = Fed().double()
    model.head.weight = model.layer.weight
    before, after = stepped(model, torch.randn(5, 4).double() + 1)
    assert F.cosine_similarity(before.flatten(), after.flatten(), 0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("late", [False, True])
def test_a_weight_that_is_computed_from_others_is_not_computed_by_the_step(late):
    model = Fed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if late:
        normkit.attach(model, optimizer)
    nn.utils.parametrizations.spectral_norm(model.layer)
    if not late:
        normkit.attach(model, optimizer)
    model(torch.randn(5, 4)).square().sum().backward()
    iterate = model.layer.parametrizations.weight[0]._u.clone()
    optimizer.step()
    assert torch.equal(model.layer.parametrizations.weight[0]._u, iterate)  # each computation moves it


def test_in_a_copy_that_is_attached_the_originals_observer_is_idle(monkeypatch):
    model = Fed()
    normkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    copied, calls = copy.deepcopy(model), []
    normkit.attach(copied, torch.optim.SGD(copied.parameters(), lr=0.01))
    observe = batchless_weights.FeedingLayer._observe
    monkeypatch.setattr(batchless_weights.FeedingLayer, "_observe", lambda *args: calls.append(args) or observe(*args))
    copied(torch.randn(5, 4)).sum().backward()
    assert len(calls) == 1


def test_a_step_at_a_misfit_counts_for_less():
    gradients = {}
    for factor in (1.0, 3.0):
        torch.manual_seed(0)
        model = nn.Sequential(BatchlessNorm1d(4, projected=True), nn.Linear(4, 2)).double()
        optimizer = torch.optim.SGD(model[1].parameters(), lr=1.0)
        x = torch.randn(100, 4).double()
        normkit.initialize(model, [x])
        normkit.attach(model, optimizer)
        model(factor * x).sum().backward()
        raw = model[1].bias.grad.clone()
        optimizer.step()
        gradients[factor] = (model[1].bias.grad / raw).mean().item()
    assert gradients[1.0] == 1
    assert gradients[3.0] == pytest.approx(1.5 / 9, rel=0.05)


def test_sigma_inflates_less_than_with_the_papers_gradient():
    inflation = {}
    for projected in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(10, 16, bias=False), BatchlessNorm1d(16, projected=projected), nn.ReLU(), nn.Linear(16, 2)]
        model = nn.Sequential(*layers)
        x = torch.randn(256, 10)
        labels = (x[:, 0] * x[:, 1] > 0).long()
        normkit.initialize(model, [x])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        normkit.attach(model, optimizer)
        start = model[1].sigma.log().mean()
        for at in range(0, 16 * 200, 16):
            index = torch.arange(at, at + 16) % 256
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), labels[index]).backward()
            optimizer.step()
        inflation[projected] = (model[1].sigma.log().mean() - start).item()
    assert inflation[True] < 0.7 * inflation[False]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_gradient_moves_a_weight_before_a_projected_layer_by_more_than_its_own_length(momentum):
    torch.manual_seed(0)
    model, x = Fed().double(), torch.randn(5, 4).double() + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3, momentum=momentum)
    normkit.attach(model, optimizer)
    weight, head = model.layer.weight.detach().clone(), model.head.weight.detach().clone()
    model(x).square().sum().backward()
    gradient = model.head.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close((model.layer.weight - weight).norm(), (1 - momentum) * weight.norm(), rtol=1e-10, atol=0)
    factor = (head - model.head.weight) / (1e3 * gradient)
    assert factor.max() < 0.01  # the whole step counts for less
    torch.testing.assert_close(factor, factor[0, 0].expand_as(factor), rtol=1e-8, atol=0)


def test_a_weight_that_starts_at_zero_is_trained():
    torch.manual_seed(0)
    model, x = Fed().double(), torch.randn(5, 4).double()
    nn.init.zeros_(model.layer.weight)
    nn.init.normal_(model.norm.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    (model(x) * torch.randn(5, 4).double()).sum().backward()
    optimizer.step()
    assert model.layer.weight.norm() > 0.01


def l2(weight):
    return 0.3 * weight.square().sum()


def l1(weight):
    return 0.3 * weight.abs().sum()


def elastic(weight):
    return (weight - torch.ones_like(weight)).square().sum()


PROCESSINGS = {"as it is": 1.0, "loss scale": 2.0**16, "clipping": 1e-3}


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, groups=2, bias=False)], ids=["linear", "conv"])
@pytest.mark.parametrize("penalty", [l2, l1, elastic])
@pytest.mark.parametrize("processing", PROCESSINGS)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_term_of_the_loss_that_names_the_weight_stays_whole(layer, penalty, processing, parts):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    norm = (BatchlessNorm1d if isinstance(layer, nn.Linear) else BatchlessNorm2d)(
        4, projected=True, dtype=torch.float64
    )
    model = nn.Sequential(layer, norm)
    x = torch.randn((6, 6) if isinstance(layer, nn.Linear) else (6, 6, 4, 4)).double() + 1
    coefficients = torch.randn_like(model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    normkit.initialize(model, [x])
    normkit.attach(model, optimizer, rate=0.0)
    scale, grads = PROCESSINGS[processing], []
    for named in (lambda weight: 0, penalty):
        optimizer.zero_grad()
        for rows, factors in zip(x.chunk(parts), coefficients.chunk(parts), strict=True):
            loss = (model(rows) * factors).sum() + named(layer.weight) / parts
            (loss * (1 if processing == "clipping" else scale)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale if processing == "clipping" else 1 / scale)
        optimizer.step()
        grads.append(layer.weight.grad / (scale if processing == "clipping" else 1))
    (expected,) = torch.autograd.grad(penalty(layer.weight), layer.weight)
    torch.testing.assert_close(grads[1] - grads[0], expected, rtol=1e-12, atol=1e-12)
    assert (grads[0] * layer.weight.detach()).flatten(1).sum(1).abs().max() < 1e-12


def again(copied):
    return pickle.loads(pickle.dumps(copied))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, again])
def test_a_model_and_its_optimizer_that_are_copied_together_go_on_alike(duplicate):
    torch.manual_seed(0)
    model, x = Fed().double(), torch.randn(5, 4).double() + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    normkit.attach(model, optimizer)

    def step(model, optimizer):
        optimizer.zero_grad()
        (model(x).square().sum() + l1(model.layer.weight)).backward()
        optimizer.step()
        return model.layer.weight

    step(model, optimizer)
    other = duplicate((model, optimizer))
    for _ in range(2):
        ours, theirs = step(model, optimizer), step(*other)
        assert isinstance(theirs, nn.Parameter)
        assert theirs is not ours
        assert torch.equal(theirs, ours)


def test_a_forward_that_raises_leaves_the_weight_in_its_place():
    model = Fed()
    normkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    weight = model.layer.weight
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    assert model.layer.weight is weight


def _assign(model, loss):
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
        parameter.grad = gradient


def zeros(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def in_halves(loss, decay):
    (loss / 2).backward(retain_graph=True)
    (loss / 2 + decay).backward()


def _projected_steps(backward, steps=3):
    torch.manual_seed(0)
    x = torch.randn(12, 6).double() + 1
    model = nn.Sequential(nn.Linear(6, 4), BatchlessNorm1d(4, projected=True)).double()
    normkit.initialize(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, lambda: model(x).pow(3).mean(), lambda: 0.1 * model[0].weight.square().sum())
        optimizer.step()
    return model[0].weight.detach()


@pytest.mark.parametrize(
    "backward",
    [
        lambda model, loss, decay: (loss().backward(), decay().backward()),
        lambda model, loss, decay: (decay().backward(), loss().backward()),
        lambda model, loss, decay: (zeros(model), loss().backward(), decay().backward()),
        lambda model, loss, decay: in_halves(loss(), decay()),
        lambda model, loss, decay: _assign(model, loss() + decay()),
        lambda model, loss, decay: (
            torch.autograd.grad(loss() + decay(), [model[0].weight]),
            (loss() + decay()).backward(),
        ),
        lambda model, loss, decay: (
            (loss() + decay()).backward(),
            torch.autograd.grad(loss(), [model[0].weight], retain_graph=True),
        ),
    ],
)
def test_a_term_on_the_weight_is_kept_apart_in_whatever_passes_it_comes(backward):
    expected = _projected_steps(lambda model, loss, decay: (loss() + decay()).backward())
    torch.testing.assert_close(_projected_steps(backward), expected, rtol=1e-12, atol=1e-12)


def attached(model):
    normkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return model


def test_a_layer_whose_forward_fails_has_its_own_weight_back():
    model = attached(Fed())
    weight = model.layer.weight
    with pytest.raises(RuntimeError):
        model.layer(torch.randn(5, 3))
    assert model.layer.weight is weight
    model(torch.randn(5, 4)).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_a_functional_call_stay_in_place_until_it_ends(training):
    class Reads(Fed):
        def forward(self, x):
            return super().forward(x), self.layer.weight

    model = attached(Reads()).train(training)
    others = {name: torch.full_like(p, 0.5).requires_grad_() for name, p in model.named_parameters()}
    output, read = torch.func.functional_call(model, others, (torch.randn(5, 4),))
    assert torch.equal(read, others["layer.weight"])
    gradients = torch.autograd.grad(output.sum(), [others["layer.weight"]])
    assert gradients[0].shape == model.layer.weight.shape


def small_convolutions():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return nn.Sequential(conv, BatchlessNorm2d(4, projected=True), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def with_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    normkit.attach(model, optimizer)
    return model, optimizer


def train(model, optimizer, batches, parts=1):
    for x in batches:
        optimizer.zero_grad()
        for part in x.chunk(parts):
            (model(part).square().sum() / len(x)).backward()
        optimizer.step()


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler on this machine")


@needs_compiler
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_that_are_counted_with_those_of_the_layer_in_front_are_the_same(monkeypatch, parts):
    monkeypatch.setattr(choice, "chosen", "")
    batches, found = torch.randn(4, 6, 3, 4, 4), []
    for few in (one_pass.few, -1):
        monkeypatch.setattr(one_pass, "few", few)
        model, optimizer = with_optimizer(small_convolutions())
        observed = []
        moments_about = batchless_layer.moments_about
        monkeypatch.setattr(
            batchless_layer, "moments_about", lambda *a, f=moments_about, o=observed: o.append(1) or f(*a)
        )
        train(model, optimizer, batches, parts)
        assert not observed or few < 0
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_an_output_that_was_written_to_is_observed_anew():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), BatchlessNorm1d(4, projected=True)

        def forward(self, x):
            return self.norm(self.layer(x))

    model, optimizer = with_optimizer(Shifts())
    model.layer.register_forward_hook(lambda *args: args[2].add_(100.0))
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert model.norm.running_mean.min() > 1


def test_masked_rows_are_left_out_where_a_layer_in_front_offers_all():
    layer, norm = nn.Linear(3, 4), BatchlessNorm1d(4, projected=True, feature_dim=-1)
    _, optimizer = with_optimizer(nn.Sequential(layer, norm))
    x, mask = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5
    expected = layer(x)[mask].mean(0) * 0.07 * 2 / (2 + 6)
    optimizer.zero_grad()
    norm(layer(x), mask).sum().backward()
    optimizer.step()
    torch.testing.assert_close(norm.running_mean.data, expected, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_a_pass_without_the_weight_in_front_says_that_nothing_is_fitted(monkeypatch):
    monkeypatch.setattr(choice, "chosen", "")
    model, optimizer = with_optimizer(small_convolutions())
    before = model[1].running_mean.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(2, 3, 4, 4)).sum().backward(inputs=[model[1].weight])
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model[1].running_mean, before)
    assert ["mu and sigma stay" in str(warning.message) for warning in caught] == [True]
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 3, 4, 4)).sum().backward(inputs=[model[1].weight])
    optimizer.step()
    assert not torch.equal(model[1].running_mean, before)


def test_a_layer_that_is_copied_alone_leaves_the_one_in_front_behind():
    model, _ = with_optimizer(small_convolutions())
    alone = copy.deepcopy(model[1])
    assert alone.in_front is None
    both = copy.deepcopy(model)
    assert both[1].in_front is not None
    assert both[1].in_front is not model[1].in_front
    for pair in (
        copy.deepcopy(with_optimizer(small_convolutions())),
        pickle.loads(pickle.dumps(with_optimizer(small_convolutions()))),
    ):
        train(*pair, torch.randn(2, 6, 3, 4, 4))
        assert pair[0][1].mismatch is not None


def test_the_hooks_that_are_removed_let_the_layer_count_by_itself():
    model = small_convolutions()
    handle = normkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    handle.remove()
    assert model[1].in_front is None


def test_a_layer_with_another_number_of_channels_than_the_one_in_front_gets_its_own_error():
    model, _ = with_optimizer(small_convolutions())
    model[0] = nn.Conv2d(3, 9, 3, padding=1)
    front = batchless_weights.FeedingLayer(model[1], model[0], model[1].counter.collector)
    with pytest.raises(ValueError, match="does not fit"):
        model(torch.randn(2, 3, 4, 4))
    front.remove()
