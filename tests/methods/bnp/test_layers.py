"""BNP on layers of all kinds: what is observed, by which rule, and what is listed as left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from normkit import BNP
from tests.methods.bnp.models import mlp, same, train


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
        bnp.discard()
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
    model = Transformer()
    bnp = BNP(model)
    model(torch.arange(6).reshape(2, 3)).sum().backward()
    bnp.precondition_()
    assert bnp.state_dict().keys() == {"block.linear1", "block.linear2"}
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


def test_inputs_given_by_keyword_and_single_samples_are_observed():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 3)
    x, h = torch.randn(2, 5, 6), torch.randn(4)
    observed = [BNP(conv), BNP(linear)]
    conv(input=x).sum().backward()
    linear(input=h).sum().backward()
    for bnp in observed:
        bnp.precondition_()
    patches = nn.functional.unfold(x[None], 3, padding=1).view(2, -1)
    assert torch.allclose(observed[0].state_dict()[""]["mean"].float(), patches.mean(1), rtol=1e-5)
    assert torch.allclose(observed[1].state_dict()[""]["mean"].float(), h, rtol=1e-5)


def test_a_model_without_layers_or_with_two_observers_is_refused():
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        BNP(nn.Sequential(nn.ReLU()))
    model = mlp()
    BNP(model)
    with pytest.raises(ValueError, match="another BNP observes this layer"):
        BNP(model)


class Functional(nn.Module):
    """A head whose weight is used, and whose forward is not."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        return nn.functional.linear(self.body(x).tanh(), nn.functional.normalize(self.head.weight), self.head.bias)


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.softmax(-1)


class OneHot(nn.Linear):
    def forward(self, indices):
        return super().forward(nn.functional.one_hot(indices, self.in_features).to(self.weight.dtype))


@pytest.mark.parametrize("max_change", [None, 0.05])
@pytest.mark.parametrize(
    ("model", "unseen", "x"),
    [
        (Functional(), "head", torch.randn(8, 4)),
        (nn.Sequential(nn.Linear(4, 16), Router(16, 3)), "1", torch.randn(8, 4)),
        (nn.Sequential(OneHot(5, 16), nn.Linear(16, 3)), "0", torch.randint(5, (8,))),
        (nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 3).eval()), "1", torch.randn(8, 4)),
    ],
    ids=["functional", "tuple", "one-hot", "eval mode"],
)
def test_a_layer_whose_rows_are_never_seen_steps_as_it_is(model, unseen, x, max_change):
    model = copy.deepcopy(model)
    layer = model.get_submodule(unseen)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bnp = BNP(model, max_change=max_change)
    bnp.attach(optimizer)
    output = model(x)
    (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    raw = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(raw, (layer.weight.grad, layer.bias.grad), strict=True))
    assert ("left alone" in repr(bnp)) == (isinstance(layer, (Router, OneHot)) or isinstance(model, Functional))
