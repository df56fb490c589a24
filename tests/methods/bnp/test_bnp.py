"""BNP in training loops: when it preconditions, what counts, and what it leaves alone."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import BNP
from normkit.inspection.counting import no_counting
from tests.methods.bnp.models import cnn, mlp, reference, same, train, twin


@pytest.mark.parametrize("batch", [8, 1])
def test_training_equals_the_slow_reference(setting, batch):
    model, data = setting
    data = [(x[:batch], y[:batch]) for x, y in data]  # of single rows, steps are divided by q^2 > 1
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


def test_an_optimizer_is_attached_once_and_again_after_its_handle_is_removed():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnp = BNP(model)
    handle = bnp.attach(optimizer)
    with pytest.raises(ValueError, match=r"attached already; call normkit.handle\(optimizer\).remove\(\)"):
        bnp.attach(optimizer)
    with pytest.raises(ValueError, match=r"normkit.BNP\(nn.ModuleList"):
        BNP(nn.Linear(2, 2)).attach(optimizer)
    handle.remove()
    bnp.attach(optimizer)


@pytest.mark.parametrize("max_change", [None, 0.05])
def test_steps_in_eval_mode_are_plain_and_said_once(setting, max_change, caplog):
    model, data = setting
    optimizer = SGD(model.parameters(), lr=0.1)
    BNP(model, max_change=max_change).attach(optimizer)
    train(model, data, optimizer.step, optimizer)
    assert not caplog.records
    model.eval()
    for x, y in data[:2]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        raw = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(g, p.grad) for g, p in zip(raw, model.parameters(), strict=True))
    assert len(caplog.records) == 1
    assert "are trained in eval mode" in caplog.text


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
        with no_counting():
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
    bnp.discard()
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
        bnp.discard()
    entry = bnp.state_dict()["0"]
    assert torch.allclose(entry["mean"], xs.mean((0, 1)), rtol=1e-12)
    assert torch.allclose(entry["variance"], xs.reshape(-1, 4).var(0, correction=0), rtol=1e-12)


def test_after_a_hundred_steps_the_newest_weighs_a_hundredth():
    layer = nn.Linear(1, 1).double()
    bnp = BNP(layer)
    for row in (*[0.0] * 150, 1.0):
        layer(torch.full((1, 1), row, dtype=torch.float64)).sum().backward()
        bnp.precondition_()
        bnp.discard()
    entry = bnp.state_dict()[""]
    assert entry["mean"].item() == pytest.approx(0.01, rel=1e-12)
    assert entry["variance"].item() == pytest.approx(0.01 * 0.99, rel=1e-12)


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
    assert [m for m in trained.modules() if m is not trained and "normkit" in type(m).__module__] == []
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


def test_what_is_removed_leaves_the_optimizer_to_its_successor(setting):
    model, data = setting
    model, optimizer, bnp = twin(model)
    train(model, data, optimizer.step, optimizer)
    state = optimizer.state_dict()
    bnp.remove()
    assert "bnp" not in optimizer.state_dict()
    successor = BNP(model)
    successor.attach(optimizer)
    optimizer.load_state_dict(state)
    assert successor.state_dict().keys() == state["bnp"].keys()


def test_a_copied_or_pickled_model_leaves_the_original_alone_and_says_that_it_trains_without_bnp(setting):
    model, data = setting
    plain, optimizer, _ = twin(model)
    train(plain, data, optimizer.step, optimizer)
    original, stepping, _ = twin(model)
    copied = copy.deepcopy(original)
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for step, (x, y) in enumerate(data):
        for other in (copied, loaded):
            with pytest.warns(UserWarning, match="BNP: this copy of a model") if step == 0 else nullcontext():
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


def test_weights_that_come_later_are_named_once_and_those_of_observed_layers_are_not(caplog):
    model = nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = SGD(model[3].parameters(), lr=0.1)
    bnp = BNP(model)
    bnp.attach(optimizer)
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[1].parameters()]})
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert not caplog.records
    assert "preconditioned  2 of 2 modules" in str(normkit.describe(model, optimizer))
    model[3] = nn.Linear(3, 2)
    optimizer.add_param_group({"params": model[3].parameters()})
    model, optimizer = copy.deepcopy((model, optimizer))
    for _ in range(2):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    assert [record.getMessage()[:30] for record in caplog.records] == ["bnp: 1 weights came into the o"]
    assert "left: 3: it came into the model after BNP(model)" in str(normkit.describe(model, optimizer))
    normkit.handle(optimizer).remove()
    BNP(model).attach(optimizer)
    assert "preconditioned  2 of 2 modules" in str(normkit.describe(model, optimizer))


def test_a_state_of_another_model_is_refused():
    bnp = BNP(mlp())
    row = {"mean": torch.zeros(5), "variance": torch.ones(5), "steps": torch.ones(())}
    with pytest.raises(ValueError, match=r"statistics of 7, which this BNP does not observe"):
        bnp.load_state_dict({"7": row})
    with pytest.raises(ValueError, match="0: the state has 5 features, the layer 6"):
        bnp.load_state_dict({"0": row})
    assert bnp.state_dict() == {}


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


def test_by_hand_the_gradients_of_the_given_optimizer_alone_are_preconditioned():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(8, 3).double() + 1
    first, second = (SGD(part.parameters(), lr=0.1) for part in (model[0], model[2]))
    bnp = BNP(model)
    bnp.attach(first)
    bnp.attach(second)
    model(x).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="several optimizers are attached; give the one"):
        bnp.precondition_()
    with pytest.raises(ValueError, match="this Adam is not attached"):
        bnp.precondition_(Adam(model.parameters()))
    bnp.precondition_(first)
    changed = [not torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True)]
    assert changed == [True, True, False, False]


def test_by_hand_gradients_that_are_zeroed_in_place_are_preconditioned_again():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(8, 3).double() + 1
    bnp = BNP(model)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        plain = model[0].weight.grad.clone()
        bnp.precondition_()
        assert not torch.equal(model[0].weight.grad, plain)


def test_a_step_that_a_fused_optimizer_skips_counts_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    bnp = BNP(model)
    bnp.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    steps = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 3)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(copy.deepcopy(bnp.state_dict()))
    weights = [p.detach().clone() for p in model.parameters()]
    assert str(steps[0]) == str(steps[1]) != str(steps[2])
    assert all(w.isfinite().all() for w in weights)


def test_a_layer_without_outputs_is_passed_over():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[1].weight, model[1].bias = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
    BNP(model)
    assert model(torch.randn(2, 3)).shape == (2, 0)


def test_an_optimizer_that_accelerate_wraps_has_the_handle_of_the_one_inside():
    _, optimizer = normkit.apply("bnp", nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), lr=0.1)

    class Wrapper(SGD):
        def __init__(self, inner):
            super().__init__(inner.param_groups, lr=0.1)
            self.optimizer = inner

    assert normkit.handle(Wrapper(optimizer)) is normkit.handle(optimizer)
