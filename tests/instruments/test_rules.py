"""The rules of the instruments: for every recipe, everything is bit for bit as before, also after a failure."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import instruments
from normkit.inspection.counting import input_counters
from tests.cases import batch_loss
from tests.cases import batches as any_batches


class Net(nn.Module):
    """Has what an instrument could disturb: statistics, dropout, power iteration, tied, frozen, unused weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.2)
        )
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.middle = spectral_norm(nn.Linear(16, 6))
        self.tied = self.body[0]
        self.head = nn.Linear(6, 3)
        self.frozen = nn.BatchNorm1d(6).eval()
        self.unused = nn.Linear(2, 2)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        x = self.body(x)
        x = torch.relu(x + self.branch(x))
        return self.head(self.frozen(self.middle(x.flatten(1))))


def objective(model, batch):
    x, y = batch
    x = x + 0.1 * torch.randn_like(x) * random.random() * np.random.random()
    return nn.functional.cross_entropy(model(x), y)


batches = partial(any_batches, (1, 4, 4), size=6, seed=0)


def seeded(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def setup(recipe):
    seeded()
    options = {"momentum": 0.9, "weight_decay": 1e-3}
    return normkit.apply(recipe, Net(), lr=0.01, batches=batches(4, seed=9), **options)


INSTRUMENTS = {
    "activations": lambda m, f, b, o, w: instruments.activations(m, f, b),
    "angular": lambda m, f, b, o, w: instruments.angular(m, o, w),
    "channels": lambda m, f, b, o, w: instruments.channels(m, f, b),
    "conditioning": lambda m, f, b, o, w: instruments.conditioning(m, f, [b, b]),
    "covariate_shift": lambda m, f, b, o, w: instruments.covariate_shift(m, f, b, w),
    "curvature": lambda m, f, b, o, w: instruments.curvature(
        m, f, b, power_iterations=2, trace_samples=1, per_layer=True
    ),
    "discrepancy": lambda m, f, b, o, w: instruments.discrepancy(m, f, b),
    "gradient_removed": lambda m, f, b, o, w: instruments.gradient_removed(m, f, b),
    "landscape": lambda m, f, b, o, w: instruments.landscape(m, f, b, lr=0.1, steps=2),
}
FIRST = sorted(INSTRUMENTS.keys() - {"angular"})  # which call of the objective fails: the first ...
SECOND = sorted(INSTRUMENTS.keys() - {"angular", "activations", "channels", "gradient_removed"})  # ... or the second
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]


def bits(tensor):
    return None if tensor is None else (id(tensor), tensor.data_ptr(), tensor._version, tensor.detach().clone())


def photograph(model, optimizer):
    return {
        "weights": {name: bits(p) for name, p in model.named_parameters()},
        "buffers": {f"{path}.{n}": bits(b) for path, m in model.named_modules() for n, b in m._buffers.items()},
        "gradients": {name: bits(p.grad) for name, p in model.named_parameters()},
        "modes": {path: m.training for path, m in model.named_modules()},
        "hooks": {path: [dict(getattr(m, name)) for name in HOOKS] for path, m in model.named_modules()},
        "tensor hooks": {name: dict(p._backward_hooks or {}) for name, p in model.named_parameters()},
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
        "optimizer": {
            k: (v if not isinstance(v, torch.Tensor) else bits(v))
            for state in optimizer.state.values()
            for k, v in state.items()
        },
        "rows": {path: [c.pending for c in counters(m)] for path, m in model.named_modules()},
    }


def counters(module):
    own = [module.counter] if hasattr(module, "counter") else []
    return own + input_counters(module)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def assert_same(before, after):
    for kind in before:
        assert same(before[kind], after[kind]), f"{kind} changed"


def in_mid_training(recipe):
    """Two steps and the gradients of a third."""
    model, optimizer = setup(recipe)
    for batch in batches(2):
        optimizer.zero_grad()
        objective(model, batch).backward()
        optimizer.step()
    before = instruments.snapshot(model)
    optimizer.zero_grad()
    objective(model, batches(3)[2]).backward()
    return model, optimizer, before


@pytest.mark.parametrize("instrument", INSTRUMENTS)
@pytest.mark.parametrize("recipe", normkit.recipes())
def test_everything_is_bit_identical_afterwards(recipe, instrument):
    model, optimizer, before = in_mid_training(recipe)
    photo = photograph(model, optimizer)
    INSTRUMENTS[instrument](model, objective, batches(1)[0], optimizer, before)
    assert_same(photo, photograph(model, optimizer))


class Trouble(Exception):
    """What a failing objective raises."""


@pytest.mark.parametrize(("instrument", "calls"), [(name, 1) for name in FIRST] + [(name, 2) for name in SECOND])
def test_everything_is_bit_identical_when_the_objective_raises(instrument, calls):
    model, optimizer, before = in_mid_training("batch")
    photo, counter = photograph(model, optimizer), []
    trouble = Trouble("mine")

    def failing(model, batch):
        loss = objective(model, batch)
        counter.append(1)
        if len(counter) == calls:
            raise trouble
        return loss

    with pytest.raises(Trouble) as caught:
        INSTRUMENTS[instrument](model, failing, batches(1)[0], optimizer, before)
    assert caught.value is trouble
    assert_same(photo, photograph(model, optimizer))


@pytest.mark.parametrize("recipe", normkit.recipes())
def test_training_with_instruments_is_bit_identical_to_training_without(recipe):
    def train(watch):
        model, optimizer = setup(recipe)
        for batch in batches(3):
            optimizer.zero_grad()
            loss = objective(model, batch)
            before = instruments.snapshot(model)
            if watch:  # between forward and backward, when the graph is alive
                instruments.landscape(model, objective, batch, lr=0.1, steps=2)
                instruments.channels(model, objective, batch)
            loss.backward()
            if watch:
                instruments.curvature(model, objective, batch)
                instruments.discrepancy(model, objective, batch)
            optimizer.step()
            if watch:
                instruments.covariate_shift(model, objective, batch, before)
        return model

    plain, watched = train(False), train(True)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_instruments_work_wherever_they_are_called(context):
    seeded()
    model = Net()
    batch = batches(1)[0]
    expected = instruments.landscape(model, objective, batch, lr=0.1, steps=2)
    with context():
        assert instruments.landscape(model, objective, batch, lr=0.1, steps=2) == expected


def test_a_compiled_model_is_measured_with_its_hooks():
    seeded()
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    expected = instruments.channels(model, batch_loss, (x, y))
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert instruments.channels(compiled, batch_loss, (x, y)).layers[0].layer == expected.layers[0].layer
    model.compile(backend="eager")
    model(x)
    found = instruments.channels(model, batch_loss, (x, y))
    assert [layer.layer for layer in found.layers] == ["1"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.use = use
            self.first, self.rest = nn.Linear(4, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x):
            x = self.first(x)
            return checkpoint(self.rest, x, use_reentrant=reentrant) if self.use else self.rest(x)

    seeded()
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    plain, saving = Checkpointed(False), Checkpointed(True)
    expected = instruments.landscape(plain, batch_loss, batch, lr=0.1, steps=3)
    photo = photograph(saving, torch.optim.SGD(saving.parameters()))
    found = instruments.landscape(saving, batch_loss, batch, lr=0.1, steps=3)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.gradient_changes == pytest.approx(expected.gradient_changes, rel=1e-4)
    assert_same(photo, photograph(saving, torch.optim.SGD(saving.parameters())))


def test_uninitialised_and_frozen_models_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="run one batch"):
        instruments.landscape(nn.LazyLinear(2), objective, None, lr=0.1)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        instruments.landscape(frozen, lambda m, b: m.weight.sum(), None, lr=0.1)


RESULTS = {
    **{name: INSTRUMENTS[name] for name in INSTRUMENTS},
    "whole spectrum": lambda m, f, b, o, w: instruments.curvature(m, f, b, power_iterations=2),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_plot_themselves_and_become_json(name):
    import json

    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
    matplotlib.use("Agg")
    model, optimizer, before = in_mid_training("batch")
    result = RESULTS[name](model, objective, batches(1)[0], optimizer, before)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))
    ax = result.plot()
    assert ax.get_title()
    assert ax.lines or ax.patches
    assert result.plot(ax) is ax
