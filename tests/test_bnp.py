"""BNP on whole models: what it observes, when it preconditions, and what it leaves alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import evenkeel
from evenkeel import BNP
from evenkeel.functional import bounding_factors, precondition
from evenkeel.methods import layer_steps
from evenkeel.methods.preconditioning import Layout
from evenkeel.moments import paused


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3, bias=False),
    )


MODELS = {"mlp": (mlp, (6,)), "cnn": (cnn, (2, 8, 8))}


@pytest.fixture(params=MODELS, name="setting")
def _setting(request):
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make().double()
    data = [(1 + torch.randn(8, *shape, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(6)]
    return model, data


def train(model, data, step, optimizer, micro=None):
    for x, y in data:
        optimizer.zero_grad()
        for part, target in zip(x.split(micro or len(x)), y.split(micro or len(y)), strict=True):
            (F.cross_entropy(model(part), target) * len(part) / len(x)).backward()
        step()


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(a, b, tolerance=1e-12):
    return torch.allclose(parameters(a), parameters(b), rtol=tolerance, atol=tolerance)


def twin(model, **options):
    """A copy with its own BNP and SGD."""
    other = copy.deepcopy(model)
    optimizer = SGD(other.parameters(), lr=0.1, momentum=0.9)
    bnp = BNP(other, **options)
    bnp.attach(optimizer)
    return other, optimizer, bnp


def reference(model, data, lr=0.1, momentum=0.9, decay=0.99):
    """BNP + SGD written out slowly: rows by hand, one layer at a time."""
    model = copy.deepcopy(model)
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
    state, velocity = {}, {p: torch.zeros_like(p) for p in model.parameters()}
    for t, (x, y) in enumerate(data, 1):
        h, taken = x, {}
        for m in model:
            inputs, h = h, m(h.clone())
            if m in layers:
                taken[m] = (inputs.detach(), h.numel() / h.shape[1])
        model.zero_grad()
        F.cross_entropy(h, y).backward()
        for m in layers:
            rows, positions = taken[m]
            shrink = 1
            if isinstance(m, nn.Conv2d):
                rows = F.pad(rows, (m.padding[1],) * 2 + (m.padding[0],) * 2)
            if isinstance(m, nn.ConvTranspose2d):
                shrink = m.stride[0] * m.stride[1]
            rows = rows.movedim(1, -1).reshape(-1, rows.shape[1])
            mean, second = rows.mean(0) / shrink, rows.square().mean(0) / shrink
            w = max(1 - decay, 1 / t)
            old_mean, old_var = state.get(m, (torch.zeros_like(mean), torch.ones_like(mean)))
            variance = (1 - w) * old_var + w * (second - mean**2) + w * (1 - w) * (mean - old_mean) ** 2
            mean = (1 - w) * old_mean + w * mean
            state[m] = mean, variance
            s = variance + 1e-2 * variance.max() + 1e-4
            transposed = isinstance(m, nn.ConvTranspose2d)
            groups = getattr(m, "groups", 1)
            weight = m.weight.grad
            outs = m.weight.shape[1] * groups if transposed else m.weight.shape[0]
            ins = len(mean)
            fan_in = m.weight.numel() / outs
            q2 = max(fan_in / positions, 1)
            full = weight.unsqueeze(-1).unsqueeze(-1) if weight.dim() == 2 else weight
            new = torch.zeros_like(full)
            new_bias = torch.zeros(outs, dtype=weight.dtype)
            for o in range(outs):
                group = o // (outs // groups)
                channels = range(group * ins // groups, (group + 1) * ins // groups)
                at = [(c, o % (outs // groups)) if transposed else (o, c - channels[0]) for c in channels]
                if m.bias is not None:
                    for c, index in zip(channels, at, strict=True):
                        new[index] = (full[index] - mean[c] * m.bias.grad[o]) / (q2 * s[c])
                    new_bias[o] = m.bias.grad[o] / q2 - sum(
                        mean[c] * new[index].sum() for c, index in zip(channels, at, strict=True)
                    )
                else:
                    metric = torch.diag(s) + torch.outer(mean, mean)
                    new[o, :, 0, 0] = torch.linalg.solve(metric, full[o, :, 0, 0]) / q2
            weight.copy_(new.reshape(weight.shape))
            if m.bias is not None:
                m.bias.grad.copy_(new_bias)
        with torch.no_grad():
            for p in model.parameters():
                velocity[p] = momentum * velocity[p] + p.grad
                p -= lr * velocity[p]
    return model


def test_training_equals_the_slow_reference(setting):
    model, data = setting
    ours, optimizer, _ = twin(model)
    train(ours, data, optimizer.step, optimizer)
    assert same(ours, reference(model, data), 1e-11)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_are_one_batch(setting, micro):
    model, data = setting
    whole, optimizer, bnp = twin(model)
    train(whole, data, optimizer.step, optimizer)
    parts, accumulating, other = twin(model)
    train(parts, data, accumulating.step, accumulating, micro=micro)
    assert same(whole, parts)
    for path, entry in bnp.state_dict().items():
        for name, value in entry.items():
            assert torch.allclose(value, other.state_dict()[path][name], rtol=1e-12, atol=1e-12)


def test_a_closure_given_to_step_is_preconditioned_too(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    closed, stepping, _ = twin(model)
    for x, y in data:

        def closure(x=x, y=y):
            stepping.zero_grad()
            loss = F.cross_entropy(closed(x), y)
            loss.backward()
            return loss

        stepping.step(closure)
    assert same(plain, closed)


def test_lbfgs_is_refused_and_a_foreign_optimizer_too():
    model = mlp()
    with pytest.raises(ValueError, match="LBFGS"):
        BNP(model).attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="holds no weight"):
        BNP(mlp()).attach(SGD(mlp().parameters(), lr=0.1))


def test_by_hand_before_clipping_is_not_repeated_by_the_step(setting):
    model, data = setting
    attached, optimizer, _ = twin(model)
    train(attached, data, optimizer.step, optimizer)
    by_hand, stepping, bnp = twin(model)

    def step():
        bnp.precondition_()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1e9)
        stepping.step()

    train(by_hand, data, step, stepping)
    assert same(attached, by_hand)


def test_a_step_that_is_skipped_after_preconditioning_by_hand_leaves_the_next_one_whole(setting):
    model, data = setting
    expected, optimizer, _ = twin(model)
    train(expected, [data[0], data[0]], optimizer.step, optimizer)
    skipping, stepping, bnp = twin(model)
    train(skipping, [data[0]], stepping.step, stepping)
    state = bnp.state_dict()
    train(skipping, [data[1]], bnp.precondition_, stepping)  # and no step
    bnp.load_state_dict(state)
    train(skipping, [data[0]], stepping.step, stepping)
    assert same(expected, skipping)


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        for part in self.model:
            x = checkpoint(part, x.requires_grad_(), use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_each_row_once(setting, reentrant):
    model, data = setting
    for layer in model:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    plain, optimizer, bnp = twin(model)
    train(plain, data, optimizer.step, optimizer)
    saving, stepping, other = twin(model)
    train(Checkpointed(saving, reentrant), [(x.clone(), y) for x, y in data], stepping.step, stepping)
    assert same(plain, saving, 1e-11)
    assert all(e["steps"] == other.state_dict()[p]["steps"] == len(data) for p, e in bnp.state_dict().items())


def test_forwards_that_do_not_train_do_not_count(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    probed, stepping, _ = twin(model)
    for x, y in data:
        stepping.zero_grad()
        probed(x * 9)  # a forward without backward
        with torch.no_grad():
            probed(x * 8)
        probed.eval()
        F.cross_entropy(probed(x * 7), y).backward()
        probed.zero_grad()
        probed.train()
        with paused():
            F.cross_entropy(probed(x * 6), y).backward()
        probed.zero_grad()
        loss = F.cross_entropy(probed(x), y)
        loss.backward(retain_graph=True)
        probed.zero_grad()
        loss.backward()  # twice through one graph: its rows count once
        stepping.step()
    assert same(plain, probed)


def test_rows_of_dropped_gradients_are_dropped(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    dropping, stepping, _ = twin(model)

    def twice(pair):
        F.cross_entropy(dropping(pair[0] * 5), pair[1]).backward()
        stepping.zero_grad()

    for pair in data:
        twice(pair)
        train(dropping, [pair], stepping.step, stepping)
    assert same(plain, dropping)


def test_a_grad_scaler_that_skips_a_step_leaves_no_trace():
    torch.manual_seed(0)
    model = mlp()
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    scaled, stepping, bnp = twin(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflow = (torch.full((8, 6), float("inf")), data[0][1])
    for x, y in [overflow, *data[:2], overflow, *data[2:]]:
        stepping.zero_grad()
        scaler.scale(F.cross_entropy(scaled(x), y)).backward()
        scaler.unscale_(stepping)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(stepping)
        scaler.update()
    assert same(plain, scaled, 1e-5)
    assert all(entry["steps"] == 4 for entry in bnp.state_dict().values())


def test_a_batch_that_is_not_finite_does_not_enter_the_statistics(setting):
    model, data = setting
    model, _, bnp = twin(model)
    x, y = data[0]
    train(model, [(x, y)], bnp.precondition_, SGD(model.parameters(), lr=0.1))
    before = bnp.state_dict()
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(torch.where(x > 2, float("nan"), x)), y).backward()
    bnp._layers[0].prepared = False
    bnp.precondition_()
    after = bnp.state_dict()
    first = next(iter(before))
    assert all(torch.equal(before[first][name], after[first][name]) for name in ("mean", "variance", "steps"))


def test_the_first_steps_weigh_evenly_and_the_start_values_never_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2)).double()
    bnp, xs = BNP(model), 5 + torch.randn(3, 7, 4, dtype=torch.float64)
    for x in xs:
        model(x).sum().backward()
        bnp.precondition_()
        bnp._layers[0].prepared = False
    entry = bnp.state_dict()["0"]
    assert torch.allclose(entry["mean"], xs.mean((0, 1)), rtol=1e-12)
    assert torch.allclose(entry["variance"], xs.reshape(-1, 4).var(0, correction=0), rtol=1e-12)


def test_padding_masked_out_does_not_exist():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = 2 + torch.randn(3, 6, 4, dtype=torch.float64)
    y = torch.randint(3, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])
    padded, optimizer, bnp = twin(model)
    unpadded, stepping, other = twin(model)
    for _ in range(3):
        optimizer.zero_grad()
        with bnp.masked(mask):
            out = padded(torch.where(mask[..., None], x, 1e6))
        F.cross_entropy(out[mask], y[mask]).backward()
        optimizer.step()
        train(unpadded, [(x[mask], y[mask])], stepping.step, stepping)
    assert same(padded, unpadded)
    assert torch.allclose(bnp.state_dict()["0"]["mean"], other.state_dict()["0"]["mean"], rtol=1e-12)


def test_the_model_stays_plain(setting):
    model, data = setting
    shape = data[0][0]
    keys, graph = list(model.state_dict()), torch.export.export(copy.deepcopy(model).eval(), (shape,)).graph
    trained, optimizer, bnp = twin(model)
    train(trained, data, optimizer.step, optimizer)
    assert list(trained.state_dict()) == keys
    assert [m for m in trained.modules() if m is not trained and "evenkeel" in type(m).__module__] == []
    assert str(torch.export.export(trained.eval(), (shape,)).graph) == str(graph)
    untouched = mlp()
    observed = BNP(untouched)
    observed.remove()
    assert all(not m._forward_hooks for m in untouched.modules())
    bnp.remove()
    assert all(not m._forward_hooks for m in trained.modules())


def test_train_and_eval_see_the_same_function(setting):
    model, data = setting
    model, optimizer, _ = twin(model)
    train(model, data, optimizer.step, optimizer)
    assert torch.equal(model(data[0][0]), model.eval()(data[0][0]))


def test_a_removed_handle_leaves_plain_steps(setting):
    model, data = setting
    plain = copy.deepcopy(model)
    sgd = SGD(plain.parameters(), lr=0.1)
    train(plain, data, sgd.step, sgd)
    ours = copy.deepcopy(model)
    optimizer = SGD(ours.parameters(), lr=0.1)
    handle = BNP(ours).attach(optimizer)
    handle.remove()
    train(ours, data, optimizer.step, optimizer)
    assert same(plain, ours)
    assert "bnp" not in optimizer.state_dict()


def test_a_copied_or_pickled_model_has_nothing_to_do_with_the_original(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    original, stepping, _ = twin(model)
    copied = copy.deepcopy(original)
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for x, y in data:
        for other in (copied, loaded):
            F.cross_entropy(other(x * 9), y).backward()
        train(original, [(x, y)], stepping.step, stepping)
    assert same(plain, original)
    assert BNP(copied).attach(SGD(copied.parameters(), lr=0.1)) is not None, "a copy can be observed anew"


def test_a_resumed_run_goes_on_exactly(setting):
    model, data = setting
    whole, optimizer, _ = twin(model)
    train(whole, data, optimizer.step, optimizer)
    first, stepping, bnp = twin(model)
    train(first, data[:3], stepping.step, stepping)
    saved = copy.deepcopy((first.state_dict(), stepping.state_dict(), bnp.state_dict()))
    second, resumed, other = twin(model)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert all(torch.equal(e["mean"], saved[2][path]["mean"]) for path, e in other.state_dict().items())
    train(second, data[3:], resumed.step, resumed)
    assert same(whole, second, 0)


def test_a_state_of_another_model_is_refused():
    bnp = BNP(mlp())
    row = {"mean": torch.zeros(5), "variance": torch.ones(5), "steps": torch.ones(())}
    with pytest.raises(ValueError, match=r"statistics of 7, which this BNP does not observe"):
        bnp.load_state_dict({"7": row})
    with pytest.raises(ValueError, match="0: the state has 5 features, the layer 6"):
        bnp.load_state_dict({"0": row})
    assert bnp.state_dict() == {}


def test_layers_without_bias_in_front_of_batch_normalization_are_only_scaled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False))
    bnp = BNP(model)
    assert "the normalization behind it removes the mean" in repr(bnp)
    assert "with the metric of a layer without bias" in repr(bnp)
    x = 1 + torch.randn(4, 2, 8, 8)
    grads = {}
    for training in (True, False):
        model.zero_grad()
        model(x).square().sum().backward()
        raw = model[0].weight.grad.clone()
        model[1].train(training)  # in eval mode it subtracts constants: then the mean is not removed
        bnp.precondition_()
        bnp._layers[0].prepared = bnp._layers[1].prepared = False
        entry = bnp.state_dict()["0"]
        s = entry["variance"] + 1e-2 * entry["variance"].max() + 1e-4
        grads[training] = torch.allclose(model[0].weight.grad, (raw / s.reshape(1, -1, 1, 1)).float(), rtol=1e-4)
    assert grads == {True: True, False: False}


class Shared(nn.Module):
    """One weight used by two modules, as an encoder and a decoder may."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Repeated(nn.Module):
    """The same, as one module called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.a(torch.tanh(self.a(x)))))


def test_tied_layers_are_one_layer_called_twice():
    torch.manual_seed(0)
    tied, repeated = Shared().double(), Repeated().double()
    repeated.load_state_dict({k: v for k, v in tied.state_dict().items() if not k.startswith("b.")})
    data = [(torch.randn(5, 4, dtype=torch.float64), torch.randint(2, (5,))) for _ in range(4)]
    for model in (tied, repeated):
        optimizer = SGD(model.parameters(), lr=0.1)
        BNP(model).attach(optimizer)
        train(model, data, optimizer.step, optimizer)
    assert same(tied, repeated)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(11, 3))

    def forward(self, tokens):
        return self.last(self.head(self.rnn(self.block(self.embed(tokens)))[0]))


def test_what_cannot_be_observed_is_listed_with_the_reason():
    bnp = BNP(Transformer())
    assert [seen.path for seen in bnp._layers] == ["block.linear1", "block.linear2"]
    reasons = {
        "embed": "not a linear or convolution layer",
        "block.self_attn": "without calling its layers",
        "rnn": "stay inside its kernel",
        "head": "shares its weight with a Embedding",
        "last": "computed from other parameters",
    }
    assert bnp.skipped.keys() == reasons.keys() | {"last.parametrizations.weight"}
    for path, reason in reasons.items():
        assert reason in bnp.skipped[path]
        assert f"{path}: left alone: " in repr(bnp)


def test_frozen_layers_and_frozen_biases_follow_their_rules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    bnp = BNP(model)
    assert "frozen: nothing to do" in repr(bnp)
    x = 2 + torch.randn(6, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    raw = model[2].weight.grad.clone()
    bnp.precondition_()
    assert model[0].weight.grad is None
    assert list(bnp.state_dict()) == ["0", "2"]
    assert bnp.state_dict()["0"]["steps"] == 0
    entry = bnp.state_dict()["2"]
    s = entry["variance"] + 1e-2 * entry["variance"].max() + 1e-4
    metric = torch.diag(s) + torch.outer(entry["mean"], entry["mean"])
    assert torch.allclose(model[2].weight.grad, torch.linalg.solve(metric, raw.T).T, rtol=1e-9)


def test_two_optimizers_precondition_each_their_own_layers(setting):
    model, data = setting
    plain = copy.deepcopy(model)
    sgd = SGD(plain.parameters(), lr=0.1)
    BNP(plain).attach(sgd)
    train(plain, data, sgd.step, sgd)
    split = copy.deepcopy(model)
    first = SGD(split[0].parameters(), lr=0.1)
    second = SGD([p for layer in list(split)[1:] for p in layer.parameters()], lr=0.1)
    bnp = BNP(split)
    bnp.attach(first)
    bnp.attach(second)
    for x, y in data:
        for optimizer in (first, second):
            optimizer.zero_grad()
        F.cross_entropy(split(x), y).backward()
        first.step()
        second.step()
    assert same(plain, split)


def test_a_lazy_layer_is_observed_once_it_has_its_shape():
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    bnp = BNP(lazy)
    with torch.no_grad():
        lazy(torch.randn(2, 2, 6, 6))
    optimizer = SGD(lazy.parameters(), lr=0.1)
    bnp.attach(optimizer)
    train(lazy, [(torch.randn(4, 2, 6, 6), torch.randint(2, (4,)))], optimizer.step, optimizer)
    assert {path: len(entry["mean"]) for path, entry in bnp.state_dict().items()} == {"0": 2, "3": 48}


def test_a_model_built_on_the_meta_device_is_observed_where_it_lands():
    with torch.device("meta"):
        model = mlp()
    bnp = BNP(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    optimizer = SGD(model.parameters(), lr=0.1)
    bnp.attach(optimizer)
    train(model, [(torch.randn(4, 6), torch.randint(3, (4,)))], optimizer.step, optimizer)
    assert bnp.state_dict()["0"]["mean"].device.type == "cpu"


def test_channels_last_and_bfloat16_models_train_as_their_plain_twins():
    torch.manual_seed(0)
    model = cnn()
    data = [(1 + torch.randn(8, 2, 8, 8), torch.randint(3, (8,))) for _ in range(3)]
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    last, stepping, _ = twin(model.to(memory_format=torch.channels_last))
    train(last, [(x.to(memory_format=torch.channels_last), y) for x, y in data], stepping.step, stepping)
    assert same(plain, last, 1e-4)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)

    half, stepping, bnp = twin(copy.deepcopy(model).bfloat16())
    train(half, [(x.bfloat16(), y) for x, y in data], stepping.step, stepping)
    assert half[0].weight.dtype == torch.bfloat16
    assert bnp.state_dict()["0"]["mean"].dtype == torch.float64
    assert same(plain, half.float(), 0.05)


def test_autocast_statistics_are_those_of_full_precision():
    torch.manual_seed(0)
    model, x = mlp(), 3 + torch.randn(64, 6)
    plain, cast = BNP(model), None
    model(x).sum().backward()
    plain.precondition_()
    expected = plain.state_dict()
    plain.remove()
    cast = BNP(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    cast.precondition_()
    assert torch.allclose(cast.state_dict()["0"]["variance"], expected["0"]["variance"], rtol=1e-6)
    assert torch.allclose(cast.state_dict()["2"]["mean"], expected["2"]["mean"], rtol=0.02, atol=0.01)


def test_inputs_given_by_keyword_and_single_samples_are_observed():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 3)
    x, h = torch.randn(2, 5, 6), torch.randn(4)
    observed = [BNP(conv), BNP(linear)]
    conv(input=x).sum().backward()
    linear(input=h).sum().backward()
    for bnp in observed:
        bnp.precondition_()
    assert torch.allclose(observed[0].state_dict()[""]["mean"].float(), x.sum((1, 2)) / (7 * 8), rtol=1e-5)
    assert torch.allclose(observed[1].state_dict()[""]["mean"].float(), h, rtol=1e-5)


def test_schedulers_and_adam_work_unchanged(setting):
    model, data = setting
    optimizer = Adam(model.parameters(), lr=0.01)
    bnp = BNP(model)
    bnp.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=60)

    def step():
        optimizer.step()
        scheduler.step()

    before = F.cross_entropy(model(data[0][0]), data[0][1]).item()
    train(model, data * 10, step, optimizer)
    assert F.cross_entropy(model(data[0][0]), data[0][1]).item() < before
    assert all(entry["steps"] == 60 for entry in bnp.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay must lie in"),
        ({"eps_relative": -0.1}, "non-negative"),
        ({"max_change": 0.0}, "max_change must be positive"),
        ({"eps_relative": 0.0, "eps": 0.0}, "not both zero"),
        ({"layers": ["1"]}, "'1' cannot be preconditioned: ReLU holds no weight"),
        ({"layers": ["nowhere"]}, "no such module"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_hooked(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        BNP(model, **options)
    assert all(not m._forward_hooks for m in model.modules())


def test_a_model_without_layers_or_with_two_observers_is_refused():
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        BNP(nn.Sequential(nn.ReLU()))
    model = mlp()
    BNP(model)
    with pytest.raises(ValueError, match="another BNP observes this layer"):
        BNP(model)


def test_a_bound_that_is_never_reached_changes_nothing(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    bounded, stepping, _ = twin(model, max_change=1e6)
    train(bounded, data, stepping.step, stepping)
    assert same(plain, bounded, 1e-12)


@pytest.mark.parametrize("by_hand", [False, True])
def test_with_a_bound_no_learning_rate_diverges(setting, by_hand):
    model, data = setting
    worst = {}
    for limit in (None, 0.1):
        trained = copy.deepcopy(model)
        optimizer = SGD(trained.parameters(), lr=30.0, momentum=0.9)
        bnp = BNP(trained, max_change=limit)
        bnp.attach(optimizer)

        def step(bnp=bnp, optimizer=optimizer):
            if by_hand:
                bnp.precondition_()
            optimizer.step()

        train(trained, data * 4, step, optimizer)
        worst[limit] = max(F.cross_entropy(trained(x), y).item() for x, y in data)
    assert worst[None] > 100
    assert worst[0.1] < 5


@pytest.mark.parametrize("largest", [1 << 22, 60])
def test_layers_stepped_together_are_each_stepped_as_if_alone(monkeypatch, largest):
    monkeypatch.setattr(layer_steps, "LARGEST_BATCH", largest)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=2) for _ in range(3)),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        *(nn.ConvTranspose2d(4, 4, (2, 1), groups=2) for _ in range(2)),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(144, 3),
        *(nn.Linear(3, 3) for _ in range(3)),
    ).double()
    model[-1].bias.requires_grad_(False)
    limit = 0.05
    optimizer = SGD([{"params": model[:5].parameters(), "lr": 3.0}, {"params": model[5:].parameters(), "lr": 5.0}])
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    bnp = BNP(model, max_change=limit)
    bnp.attach(optimizer)
    for last_but_one in (True, False):
        model[-2].requires_grad_(last_but_one)  # in the second step one layer is missing
        optimizer.zero_grad()
        x, y = 1 + torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randint(3, (4,))
        F.cross_entropy(model(x), y).backward()
        raw = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        bnp.precondition_()
        bounded = 0
        for seen, metric in bnp.metrics():
            layer, shape = seen.layer, seen.geometry
            if layer.weight not in raw:
                continue
            weight_grad, bias_grad = raw[layer.weight], raw.get(layer.bias)
            options = {"groups": shape.groups, "transposed": shape.transposed, "mean_removed": seen.mean_removed}
            weight, bias = precondition(weight_grad, bias_grad, *metric[:2], divisor=metric.divisor, **options)
            layout = Layout(weight.shape, shape.groups, shape.transposed)
            rows, ours, start = (layout.rows(t.detach()) for t in (weight_grad, weight, layer.weight))
            # |dz|^2 = (G_W . W~ + G_b b~) / q^2, the form that does not need z
            change = ((rows * ours).sum(-1).flatten() + (0 if bias is None else bias_grad * bias)) / metric.divisor
            spread = (start.square() * layout.along_in(metric.variance)).sum(-1).flatten()
            factors = bounding_factors(rates[layer.weight] * change.sqrt(), spread.sqrt(), limit)
            bounded += (factors < 1).sum().item()
            expected = layout.weight(ours * layout.units(factors))
            assert torch.allclose(layer.weight.grad, expected, rtol=1e-10, atol=1e-15)
            if bias is not None:
                assert torch.allclose(layer.bias.grad, bias * factors, rtol=1e-10, atol=1e-15)
        assert bounded
        optimizer.step()


def test_a_bound_needs_the_learning_rate():
    model = mlp()
    bnp = BNP(model, max_change=0.1)
    model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(ValueError, match="attach the optimizer first"):
        bnp.precondition_()


def test_a_gradient_that_a_fused_optimizer_will_unscale_is_bounded_as_the_true_one():
    torch.manual_seed(0)
    x, grads = torch.randn(4, 6), []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        model = mlp()
        optimizer = SGD(model.parameters(), lr=5.0)
        bnp = BNP(model, max_change=0.1)
        bnp.attach(optimizer)
        optimizer.grad_scale = torch.tensor(scale)
        (model(x).square().sum() * scale).backward()
        bnp.precondition_()
        grads.append(model[0].weight.grad / scale)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["bnp", "bnp-paper", "bnp-adam", "group+bnp"])
@pytest.mark.parametrize("batch", [1, 8])
def test_recipes_train_a_network_whose_batch_normalization_they_replace(name, batch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2)
    )
    model, optimizer = evenkeel.apply(name, model, lr=0.003 if "adam" in name else 0.02)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    losses = []
    for _ in range(480 // batch):
        y = torch.randint(2, (batch,))
        x = torch.randn(batch, 1, 6, 6)
        x[:, :, 2:4, 2:4] += 3 * y.float().reshape(-1, 1, 1, 1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    half = len(losses) // 2
    assert sum(losses[half:]) < 0.7 * sum(losses[:half])


def test_an_mlp_learns_from_shifted_inputs_one_example_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = SGD(model.parameters(), lr=0.3)
    BNP(model, max_change=0.05).attach(optimizer)
    losses = []
    for _ in range(400):
        y = torch.randint(2, (1,))
        x = 4 + torch.randn(1, 10) + y[:, None] * torch.linspace(-2, 2, 10)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[200:]) < 0.6 * 200 * 0.6931, "far below guessing"
