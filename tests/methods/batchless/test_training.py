"""Training batchless layers: micro-batches, ranks, scalers, checkpointing and optimizers must not show in the result."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d, batchless_layers
from tests.gloo import one_of

VARIANTS = {
    "batchless": {},
    "no affine": {"affine": False},
    "plain": {"gradient": "plain"},
    "shared, inv, plain": {"shared": True, "scale": "inv", "gradient": "plain"},
    "shared": {"shared": True},
    "projected": {"projected": True},
    "projected, no affine": {"projected": True, "affine": False},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def network(options, wrap=lambda block: block):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchlessNorm2d(4, **options), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), BatchlessNorm2d(5, **options), nn.ReLU())
    return nn.Sequential(wrap(first), wrap(second), nn.Flatten(), nn.Linear(5 * 4, 3)).double()


def data(size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randint(0, 3, (size,), generator=generator)


def sum_loss(outputs, labels, count):
    return F.cross_entropy(outputs, labels, reduction="sum") / count


def state(model):
    return torch.cat([t.detach().flatten() for t in (*model.parameters(), *model.buffers())])


def decay(model):
    """A term of the loss that names a weight."""
    return 0.1 * model[0][0].weight.square().sum()


def train(model, split, *, optimizer=None, steps=4, scaler=None, term=lambda model: 0):
    """The model's state after some steps on the same 16 instances, in micro-batches of the sizes in ``split``."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    normkit.attach(model, optimizer)
    x, labels = data()
    for _ in range(steps):
        optimizer.zero_grad()
        for inputs, targets in zip(x.split(split), labels.split(split), strict=True):
            loss = sum_loss(model(inputs), targets, 16) + term(model) / len(split)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return state(model)


def assert_same(a, b, tolerance=1e-12):
    assert (a - b).abs().max() < tolerance


@variants
@pytest.mark.parametrize("split", [[1] * 16, [4] * 4, [7, 1, 5, 3]], ids=["ones", "fours", "unequal"])
def test_micro_batches_do_not_show(options, split):
    assert_same(train(network(options), split), train(network(options), [16]))


@variants
@pytest.mark.parametrize("parts", [1, 4, 16])
def test_mean_losses_divided_by_the_number_of_micro_batches_do_not_show(options, parts):
    model = network(options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    x, labels = data()
    for _ in range(4):
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(parts), labels.chunk(parts), strict=True):
            (F.cross_entropy(model(inputs), targets) / parts).backward()
        optimizer.step()
    whole = network(options)
    assert_same(state(model), train(whole, [16], optimizer=torch.optim.SGD(whole.parameters(), lr=0.1)))


@variants
def test_a_gradient_scaler_does_not_show(options):
    scaled = train(network(options), [4] * 4, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    unscaled = train(network(options), [16])
    assert_same(scaled, unscaled)


@variants
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(options, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x.requires_grad_(), use_reentrant=reentrant)

    assert_same(train(network(options, Checkpointed), [16]), train(network(options), [16]))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_optimizers_momentum_decay_and_kind_do_not_reach_the_statistics(name):
    results = []
    for weight_decay, momentum in ((0.0, 0.0), (0.5, 0.9)):
        norm = BatchlessNorm1d(3, affine=False, dtype=torch.float64)
        head = nn.Linear(3, 1).double()
        own = {"SGD": {"momentum": momentum}, "Adam": {}}[name]
        params = [*norm.parameters(), *head.parameters()]
        optimizer = getattr(torch.optim, name)(params, lr=0.1, weight_decay=weight_decay, **own)
        handle = normkit.attach(norm, optimizer)
        torch.manual_seed(0)
        for _ in range(5):
            optimizer.zero_grad()
            head(norm(torch.randn(8, 3).double() * 3 + 1)).sum().backward()
            optimizer.step()
        handle.remove()
        results.append(torch.cat([norm.running_mean, norm.running_var]))
    assert_same(results[0], results[1], 1e-15)
    assert results[0].abs().min() > 0


def test_clipping_does_not_see_the_likelihood():
    model = network({"gradient": "plain"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    x, labels = data()
    for _ in range(2):
        sum_loss(model(x * 100), labels, 16).backward()
        assert all(layer.running_mean.grad is None for layer in batchless_layers(model))
        optimizer.step()


def test_plain_statistics_get_a_group_without_weight_decay():
    model = network({"gradient": "plain"})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1)
    normkit.attach(model, optimizer)
    *_, own = optimizer.param_groups
    assert own["weight_decay"] == 0
    means = {layer.running_mean for layer in batchless_layers(model)}
    assert means < set(own["params"])
    assert len(own["params"]) == 2 * len(means)
    assert not set(own["params"]) & set(optimizer.param_groups[0]["params"])


def observed(model, run):
    """Whether a forward (and backward) pass moves the statistics at the next step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    handle = normkit.attach(model, optimizer)
    before = batchless_layers(model)[0].running_mean.clone()
    run(model)
    optimizer.step()
    handle.remove()
    return not torch.equal(before, batchless_layers(model)[0].running_mean)


def backward(model):
    model(data()[0]).sum().backward()


def without_grad(model):
    with torch.no_grad():
        model(data()[0])


def forward_only(model):
    model(data()[0])


def in_eval_mode(model):
    model.eval()(data()[0]).sum().backward()
    model.train()


def overflowed(model):
    model(data()[0] * float("inf")).sum().backward()


@pytest.mark.parametrize(
    ("run", "counts"),
    [(backward, True), (without_grad, False), (forward_only, False), (in_eval_mode, False), (overflowed, False)],
)
def test_only_finite_training_passes_with_gradients_count(run, counts):
    assert observed(network({}), run) == counts


@variants
def test_a_second_backward_pass_counts_no_row_twice(options):
    once, twice = network(options), network(options)
    for model, shares in ((once, [1.0]), (twice, [0.25, 0.75])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        normkit.attach(model, optimizer)
        x, labels = data()
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum_loss(model(x), labels, 16)
            for share in shares:
                (share * loss).backward(retain_graph=True)
            optimizer.step()
    assert_same(state(once), state(twice))


def test_gradients_that_are_dropped_take_the_observation_along():
    model = network({"projected": True})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    before = state(model)
    backward(model)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(state(model), before, 1e-15)


def test_a_closure_is_the_same_step():
    plain, closed = network({}), network({})
    expected = train(plain, [16])
    optimizer = torch.optim.SGD(closed.parameters(), lr=0.1, momentum=0.9)
    normkit.attach(closed, optimizer)
    x, labels = data()

    def closure():
        optimizer.zero_grad()
        loss = sum_loss(closed(x), labels, 16)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert_same(state(closed), expected)


def test_a_layer_that_nobody_attached_says_so_once():
    norm = BatchlessNorm1d(2)
    x = torch.randn(3, 2, requires_grad=True)
    for _ in range(7):
        norm(x).sum().backward()
    with pytest.warns(UserWarning, match=r"BatchlessNorm1d: 8 backward passes, .* normkit\.attach"):
        norm(x).sum().backward()
    norm(x).sum().backward()


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_attach_refuses_a_rate_out_of_range_before_anything_is_hooked(rate):
    model = network({})
    with pytest.raises(ValueError, match=f"rate is {rate}"):
        normkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), rate=rate)
    assert not any(layer.is_collected for layer in batchless_layers(model))


def test_attach_refuses_a_model_without_layers_and_a_second_attachment():
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no batchless layer"):
        normkit.attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    model = network({})
    with pytest.raises(ValueError, match="this SGD holds no parameter of the model"):
        normkit.attach(model, torch.optim.SGD(plain.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with normkit.attach(model, optimizer), pytest.raises(ValueError, match=r"'0\.1' is attached already"):
        normkit.attach(model, optimizer)
    normkit.attach(model, optimizer)


@variants
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_run_resumed_from_its_state_dicts_goes_on_exactly(options, kind):
    def run(steps, saved=None):
        model = network(options).float()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
        normkit.attach(model, optimizer)
        if saved:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        x, labels = data()
        for _ in range(steps):
            optimizer.zero_grad()
            sum_loss(model(x.float()), labels, 16).backward()
            optimizer.step()
        return model, (model.state_dict(), optimizer.state_dict())

    _, half = run(3)
    buffer = io.BytesIO()
    torch.save(half, buffer)
    resumed, _ = run(3, torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(state(resumed), state(run(6)[0]))


def test_removing_the_handle_leaves_the_statistics_alone():
    model = network({})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer).remove()
    before = model[0][1].running_mean.clone()
    backward(model)
    optimizer.step()
    assert torch.equal(model[0][1].running_mean, before)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: {"input": x}], ids=["tensor", "tuple", "dict"]
)
def test_initialize_normalizes_every_layer_whatever_the_batches(wrap):
    model = network({"eps": 0.0})
    model[0].eval()
    x, _ = data(48)
    forward = (lambda m, b: m(b["input"])) if isinstance(wrap(x), dict) else None
    normkit.initialize(model, [wrap(part) for part in x.split([20, 4, 24])], forward=forward)
    assert [block.training for block in model[:2]] == [False, True]
    outputs = []
    for layer in batchless_layers(model):
        layer.register_forward_hook(lambda _, args, out: outputs.append(out))
    with torch.no_grad():
        model(x)
    assert len(outputs) == 2
    for out in outputs:
        var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
        torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=1e-12)


def test_initialize_reads_no_more_than_it_needs():
    model = network({})
    x, _ = data(8)

    def endless():
        while True:
            yield x

    normkit.initialize(model, endless(), samples=20)
    few = network({})
    normkit.initialize(few, [x, x, x])
    assert torch.equal(state(model), state(few))


def test_initialize_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="no batchless layer"):
        normkit.initialize(nn.Linear(2, 2), [torch.randn(1, 2)])
    with pytest.raises(ValueError, match="batches is empty"):
        normkit.initialize(network({}), [])
    with pytest.raises(ValueError, match=r"one tensor of shape \(16, 3, 6, 6\); give several, or \[batch\]"):
        normkit.initialize(network({}), data()[0])


def test_initialize_restores_modes_when_the_model_raises():
    model = network({})
    with pytest.raises(RuntimeError):
        normkit.initialize(model, [torch.randn(2, 7, 6, 6).double()])
    assert all(module.training for module in model.modules())
    assert not any(layer._forward_pre_hooks for layer in batchless_layers(model))


RANKED = {"batchless": {}, "projected": {"projected": True}}


@one_of(2)
def rank(index, folder):
    collectives = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: collectives.append(tensor) or all_reduce(tensor, **options)
    for name, options in RANKED.items():
        model = network(options)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        normkit.attach(model, optimizer)
        x, labels = (t.chunk(2)[index] for t in data())
        for _ in range(4):
            optimizer.zero_grad()
            (F.cross_entropy(parallel(x), labels) + decay(model)).backward()
            optimizer.step()
        torch.save({"state": model.state_dict(), "collectives": len(collectives)}, f"{folder}/{name}-{index}.pt")
        collectives.clear()


@pytest.mark.slow
def test_two_ranks_are_one_process_with_both_halves_and_one_all_reduce_per_step(tmp_path):
    mp.spawn(rank, args=(str(tmp_path),), nprocs=2)
    for name, options in RANKED.items():
        model = network(options)
        train(model, [16], term=decay)
        for index in range(2):
            saved = torch.load(tmp_path / f"{name}-{index}.pt")
            assert saved["collectives"] == 4
            for key, want in model.state_dict().items():
                torch.testing.assert_close(saved["state"][key], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["batchless", "batchless-adam", "batchless-projected"])
def test_recipes_train_in_micro_batches_of_one_as_in_one_batch(name):
    states = []
    x, labels = data()
    for split in ([16], [1] * 16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
        model, optimizer = normkit.apply(name, model.double(), lr=0.01, batches=[x])
        assert not model[0].bias.requires_grad
        for _ in range(4):
            optimizer.zero_grad()
            for inputs, targets in zip(x.split(split), labels.split(split), strict=True):
                sum_loss(model(inputs), targets, 16).backward()
            optimizer.step()
        states.append(state(model))
    # Adam divides by |gradient|: where that is near its eps, rounding is amplified
    assert_same(*states, tolerance=1e-9 if name == "batchless-adam" else 1e-12)


@pytest.mark.parametrize("instances", [1, 16])
def test_by_default_a_step_of_many_instances_moves_mu_by_seven_hundredths(instances):
    norm = BatchlessNorm1d(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    normkit.attach(norm, optimizer)
    norm(torch.ones(instances, 2).double()).sum().backward()
    optimizer.step()
    share = 0.07 * instances / (instances + 6)
    torch.testing.assert_close(norm.running_mean.data, torch.full((2,), share, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "gradient", "projected"),
    [("batchless", "natural", False), ("batchless-adam", "plain", False), ("batchless-projected", "natural", True)],
)
def test_recipes_fit_mu_and_sigma_as_their_card_says(name, gradient, projected):
    model, optimizer = normkit.apply(name, nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), lr=0.01)
    assert (model[1].gradient, model[1].scale, model[1].projected) == (gradient, "log", projected)
    assert isinstance(optimizer, torch.optim.Adam) == (name == "batchless-adam")
    assert any(p is model[1].running_mean for p in optimizer.param_groups[-1]["params"])


@pytest.mark.parametrize("name", ["batchless", "batchless-adam", "batchless-projected"])
def test_recipes_start_from_what_the_model_knew(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(20, 5).double()
    model(x)
    before = model.eval()(x)
    model, _ = normkit.apply(name, model, lr=0.01)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler's own look at a resumed frame
@variants
def test_compiled_equals_eager(options):
    torch.compiler.reset()
    compiled = network(options)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    normkit.attach(compiled, optimizer)
    fast = torch.compile(compiled, backend="aot_eager")
    x, labels = data()
    for _ in range(4):
        optimizer.zero_grad()
        sum_loss(fast(x), labels, 16).backward()
        optimizer.step()
    assert_same(state(compiled), train(network(options), [16]))


@pytest.mark.parametrize("forward_first", [False, True])
def test_an_affine_free_first_layer_of_frozen_inputs_learns_too(forward_first):
    norm = BatchlessNorm1d(3, affine=False, dtype=torch.float64)
    head = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    normkit.attach(norm, optimizer, rate=0.5)
    torch.manual_seed(0)
    for _ in range(30):
        if not forward_first:
            optimizer.zero_grad()
        loss = head(norm(torch.randn(500, 3).double() * 3 + 1)).sum()
        if forward_first:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(norm.sigma, torch.full((3,), 3.0).double(), rtol=0.2, atol=0)


@variants
def test_unfreezing_every_parameter_changes_nothing(options):
    thawed = network(options).requires_grad_(False).requires_grad_(True)
    assert_same(train(thawed, [16]), train(network(options), [16]))


@pytest.mark.parametrize("name", ["batchless", "batchless-adam"])
def test_unfreezing_every_parameter_does_not_train_a_bias_that_the_conversion_froze(name):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model, optimizer = normkit.apply(name, model, lr=0.1)
    before = model[0].bias.clone()
    model, optimizer = copy.deepcopy((model.requires_grad_(True), optimizer))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].bias, before)


@variants
def test_an_empty_batch_trains_nothing_and_harms_nothing(options):
    model = network(options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    before = state(model)
    model(data()[0][:0]).sum().backward()
    optimizer.step()
    assert_same(state(model), before)


def test_an_optimizer_of_named_parameters_keeps_their_names():
    model = network(VARIANTS["plain"])
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1)
    normkit.attach(model, optimizer)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert optimizer.param_groups[1]["param_names"] == [
        "0.1.running_mean", "0.1.rho", "1.1.running_mean", "1.1.rho"
    ]  # fmt: skip
    assert len(names) == len(params) == len(set(names))


def test_a_fused_optimizer_under_a_scaler_trains_and_skips_as_another():
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        model, optimizer = normkit.apply(
            "batchless",
            model,
            lr=0.03,
            options={"gradient": "plain"},
            optimizer=lambda g, fused=fused: torch.optim.SGD(g, fused=fused),
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 3) + 1).square().mean()
            scaler.scale(loss * (float("inf") if step == 3 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append([t.clone() for t in model.state_dict().values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_group_of_mean_and_deviation_has_the_options_of_the_others_and_is_minimized():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    _, optimizer = normkit.apply(
        "batchless",
        model,
        lr=0.03,
        options={"gradient": "plain"},
        optimizer=lambda g: torch.optim.SGD(g, momentum=0.5, maximize=True, weight_decay=0.1),
    )
    own = optimizer.param_groups[-1]
    assert (own["lr"], own["momentum"], own["maximize"], own["weight_decay"]) == (0.03, 0.5, False, 0.0)
