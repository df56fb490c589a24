import copy
import math

import pytest
import torch
from torch import nn

import normkit
from normkit.methods.riemannian.optimizers import SGDG, AdamG
from tests.methods.riemannian.reference import Reference

SHAPES = [(8, 3, 5, 5), (6, 8, 3, 3), (10, 6, 1, 1), (6, 6), (5, 72), (4, 75), (3, 2, 3, 2, 2)]
RULES = {"sgdg": SGDG, "adamg": AdamG}


def weights(dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((3 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype)) for s in shapes]


def gradients(params, step, size=0.2, inward=0.1):
    """Gradients that depend on the weights, some above the clip and some below, one row zero."""
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        g = size * torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(p[0].numel())
        g[1] *= 4
        g -= inward * p.detach().double()
        g[2] = 0
        p.grad = g.to(p.dtype).to(memory_format=layout(p))


def layout(p):
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"orthogonality": 0.0},
        {"orthogonality": 0.0, "max_norm": math.inf},
        {"max_norm": 0.02, "lr": 1.5},
        {"momentum": 0.5, "betas": (0.5, 0.8)},
    ],
    ids=str,
)
def test_hundred_steps_equal_the_reference_in_float64(rule, options, foreach):
    options = {"lr": 0.3, **options}
    params = weights()
    accepted = {k: v for k, v in options.items() if rule == "adamg" or k != "betas"}
    optimizer = RULES[rule]([{"params": params, "manifold": True}], foreach=foreach, **accepted)
    references = [
        Reference(
            rule,
            p,
            lr=options["lr"],
            alpha=options.get("orthogonality", 0.1),
            nu=options.get("max_norm", 0.1),
            momentum=options.get("momentum", 0.9),
            betas=options.get("betas", (0.9, 0.99)),
        )
        for p in params
    ]
    for step in range(100):
        gradients(params, step)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad)
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert torch.allclose(p.detach(), reference.weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_stacked_steps_equal_the_readable_ones(rule, dtype):
    results = []
    for foreach in (True, False):
        params = weights(dtype)
        optimizer = RULES[rule]([{"params": params, "manifold": True}], lr=0.1, foreach=foreach)
        run(optimizer, params, 100)
        results.append(params)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for fast, readable in zip(*results, strict=True):
        assert torch.allclose(fast.float(), readable.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("small", [100, 10_000], ids=["in place", "stacked"])
@pytest.mark.parametrize("rule", RULES)
def test_large_weights_and_stacks_in_parts_equal_the_readable_path(rule, small, monkeypatch):
    import normkit.methods.riemannian.foreach as module

    monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setitem(module.CHUNK, "cpu", 300)  # several runs of rows per weight, several stacks per shape
    results = []
    for foreach in (True, False):
        params = weights(shapes=[*SHAPES, (3, 6, 1, 1), (42, 6, 1, 1), (7, 6, 1, 1)])
        optimizer = RULES[rule]([{"params": params, "manifold": True}], lr=0.1, foreach=foreach)
        run(optimizer, params, 20)
        results.append(params)
    for fast, readable in zip(*results, strict=True):
        assert torch.allclose(fast, readable, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_resuming_from_a_state_dict_is_bit_identical(rule, foreach, dtype):
    def build(params):
        bias = nn.Parameter(torch.zeros(4, dtype=dtype))
        groups = [{"params": params, "manifold": True}, {"params": [bias], "lr": 0.01}]
        return RULES[rule](groups, lr=0.1, foreach=foreach), [*params, bias]

    def bias_gradient(bias, step):
        bias.grad = torch.full_like(bias, math.sin(step))

    def go(optimizer, params, steps):
        for step in steps:
            gradients(params[:-1], step)
            bias_gradient(params[-1], step)
            optimizer.step()

    optimizer, params = build(weights(dtype))
    go(optimizer, params, range(20))
    saved = copy.deepcopy((optimizer.state_dict(), params))
    go(optimizer, params, range(20, 40))
    resumed, other = build(weights(dtype, seed=5))
    with torch.no_grad():
        for p, q in zip(other, saved[1], strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved[0])
    go(resumed, other, range(20, 40))
    for p, q in zip(params, other, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_channels_last_weights_give_the_same_steps_and_keep_their_layout(rule):
    plain, other = weights(torch.float32), weights(torch.float32)
    for p in other:
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    for params in (plain, other):
        run(RULES[rule]([{"params": params, "manifold": True}], lr=0.1), params, 20)
    for p, q in zip(plain, other, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)
        if q.ndim == 4:
            assert q.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rule", RULES)
def test_weights_with_holes_in_memory_and_foreign_gradient_layouts_work(rule):
    storage = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    plain, holed = nn.Parameter(storage[:, ::2].clone()), nn.Parameter(storage[:, ::2])
    for p in (plain, holed):
        optimizer = RULES[rule]([{"params": [p], "manifold": True}], lr=0.1)
        for step in range(10):
            gradients([p], step)
            if p is holed:
                p.grad = p.grad.to(memory_format=torch.channels_last)
            optimizer.step()
    assert not holed.is_contiguous()
    assert torch.allclose(plain, holed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_only_read(rule, foreach):
    params, rest = weights(torch.float32), [nn.Parameter(torch.randn(5))]
    groups = [{"params": params, "manifold": True}, {"params": rest, "weight_decay": 0.1}]
    optimizer = RULES[rule](groups, lr=0.1, foreach=foreach)
    for step in range(3):
        gradients(params, step)
        rest[0].grad = torch.randn(5)
        before = [p.grad.clone() for p in params + rest]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params + rest, before, strict=True))


def test_rounding_does_not_grow_where_the_gradient_points_outward():
    """Weights that are not invariant: projecting with y of length 1 + e leaves -2e (y.g) y; momentum multiplies it."""
    params = weights()
    optimizer = SGDG([{"params": params, "manifold": True}], lr=0.3, orthogonality=0.0)
    literal = [Reference("sgdg", p, lr=0.3, alpha=0.0) for p in params]
    for step in range(100):
        gradients(params, step, inward=-0.2)
        for p, reference in zip(params, literal, strict=True):
            reference.step(p.grad)
        optimizer.step()
    assert max((reference.y.norm(dim=1) - 1).abs().max() for reference in literal) > 1e-9
    assert max((p.detach().flatten(1).norm(dim=1) - 1).abs().max() for p in params) < 1e-15


@pytest.mark.parametrize("rule", RULES)
def test_rows_stay_on_the_sphere_even_in_bfloat16(rule):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        params = weights(dtype)
        optimizer = RULES[rule]([{"params": params, "manifold": True}], lr=0.01)
        run(optimizer, params, 500)
        for p in params:
            assert (p.detach().float().flatten(1).norm(dim=1) - 1).abs().max() < tolerance


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("strided", [False, True], ids=["torch's fused SGD", "torch's foreach SGD"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_ordinary_groups_follow_nesterov_with_the_decay_in_the_gradient_or_beside_it(rule, decoupled, strided, foreach):
    lr, decay = 0.05, 0.1
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    p = nn.Parameter(torch.stack([start, start], 1)[:, 0] if strided else start.clone())
    y = nn.Parameter(torch.ones(2, 3))
    euclidean = {"params": [p], "lr": lr, "weight_decay": decay}
    if decoupled:
        euclidean["decoupled_weight_decay"] = True
    optimizer = RULES[rule]([{"params": [y], "manifold": True}, euclidean], foreach=foreach)
    expected, buffer = start, torch.zeros(7, dtype=torch.float64)
    for step in range(50):
        p.grad = torch.cos(p.detach() + step)
        g = torch.cos(expected + step) + (0 if decoupled else decay * expected)
        buffer = 0.9 * buffer + g
        expected = expected - (lr * decay * expected if decoupled else 0) - lr * (g + 0.9 * buffer)
        optimizer.step()
    assert p.is_contiguous() != strided
    assert torch.allclose(p, expected, rtol=0, atol=1e-12)


def test_decay_in_the_gradient_is_ten_times_as_strong_as_beside_it():
    """At momentum 0.9 and once the momentum has built up, without a gradient of the loss."""
    rates = {}
    for decoupled in (False, True):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        groups = [{"params": [nn.Parameter(torch.ones(2, 3))], "manifold": True}, {"params": [p], "lr": 0.01}]
        optimizer = SGDG(groups, weight_decay=1e-3, decoupled_weight_decay=decoupled)
        for _ in range(1000):
            p.grad, before = torch.zeros_like(p), p.detach().clone()
            optimizer.step()
        rates[decoupled] = float((1 - p.detach() / before)[0])
    assert rates[False] / rates[True] == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"decoupled_weight_decay": True}], ids=str)
@pytest.mark.parametrize("name", ["sgd-g", "adam-g", "sgd-g-paper", "adam-g-paper"])
def test_recipes_decay_as_torchs_nesterov_does_unless_told_otherwise(name, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    model, optimizer = normkit.apply(name, model, lr=0.2, weight_decay=0.1, options=options)
    (group,) = [g for g in optimizer.param_groups if g["weight_decay"]]
    weight = model[3].weight
    twin = nn.Parameter(weight.detach().clone())
    rest = torch.optim.SGD([twin], lr=group["lr"], momentum=0.9, weight_decay=0.1, nesterov=True)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        weight.grad = torch.randn(2, 16, generator=generator, dtype=torch.float64)
        twin.grad = weight.grad.clone()
        optimizer.step()
        rest.step()
    assert torch.allclose(weight, twin, rtol=0, atol=1e-12) is not bool(options)


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_leaves_manifold_groups_alone(rule):
    results = []
    for decay in (0.0, 0.5):
        params = weights()
        run(RULES[rule]([{"params": params, "manifold": True, "weight_decay": decay}]), params, 5)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_tensor_learning_rates_equal_numbers(rule):
    results = []
    for kind in (float, torch.tensor):
        params, rest = weights(), [nn.Parameter(torch.ones(5, dtype=torch.float64))]
        groups = [{"params": params, "manifold": True}, {"params": rest, "weight_decay": 0.1}]
        optimizer = RULES[rule](groups, lr=kind(0.125))
        for step in range(5):
            gradients(params, step)
            rest[0].grad = torch.ones_like(rest[0])
            optimizer.step()
        results.append(params + rest)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-7) for p, q in zip(*results, strict=True))


def test_capturable_counting_gives_the_same_steps():
    results = []
    for capturable in (False, True):
        params = weights()
        optimizer = AdamG([{"params": params, "manifold": True}], capturable=capturable)
        run(optimizer, params, 10)
        results.append(params)
    assert all(torch.allclose(p, q, rtol=0, atol=2e-6) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_schedulers_and_closures_drive_both_kinds_of_group(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x, target = torch.randn(32, 6), torch.randint(2, (32,))
    groups = [{"params": [model[0].weight], "manifold": True, "lr": 0.2}, {"params": model[3].parameters(), "lr": 0.05}]
    optimizer = RULES[rule](groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        return loss

    losses = []
    for _ in range(40):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < 0.9 * losses[0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_grad_scaler_unscales_before_the_clip(rule):
    results = []
    for scale in (None, 2.0**10):
        params = weights(torch.float32)
        optimizer = RULES[rule]([{"params": params, "manifold": True}], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(5):
            gradients(params, step)
            target = [p.grad.clone() for p in params]
            optimizer.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, target, strict=True))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(params)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_an_overflowed_step_is_skipped(rule):
    params = weights(torch.float32)
    optimizer = RULES[rule]([{"params": params, "manifold": True}])
    before = copy.deepcopy(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum((p * math.inf).sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_deepcopies_step_on_their_own(rule):
    params = weights()
    optimizer = RULES[rule]([{"params": params, "manifold": True}])
    run(optimizer, params, 3)
    twin_optimizer = copy.deepcopy(optimizer)
    twins = twin_optimizer.param_groups[0]["params"]
    run(optimizer, params, 3, start=3)
    run(twin_optimizer, twins, 3, start=3)
    twin_optimizer.add_param_group({"params": [nn.Parameter(torch.full((2, 2), 5.0))], "manifold": True})
    assert all(torch.equal(p, q) for p, q in zip(params, twins[: len(params)], strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_copied_or_loaded_optimizer_loads_a_state_as_often_as_it_is_given_one(rule):
    params = weights()
    optimizer = copy.deepcopy(RULES[rule]([{"params": params, "manifold": True}]))
    held = optimizer.param_groups[0]["params"]
    run(optimizer, held, 1)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(optimizer.state_dict()["state"], kept, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_state_is_shaped_like_the_weight_and_float32_beside_half_precision(rule):
    p = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16))
    optimizer = RULES[rule]([{"params": [p], "manifold": True}])
    run(optimizer, [p], 1)
    state = optimizer.state[p]
    tau = state["momentum_buffer" if rule == "sgdg" else "exp_avg"]
    assert (tau.shape, tau.dtype) == (p.shape, torch.float32)
    if rule == "adamg":
        assert state["exp_avg_sq"].shape == (4, 1, 1, 1)


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_without_gradient_is_left_and_may_join_later(rule):
    params = weights()
    optimizer = RULES[rule]([{"params": params, "manifold": True}])
    still = params[0].detach().clone()
    for step in range(3):
        gradients(params[1:], step)
        optimizer.step()
    assert torch.equal(params[0], still)
    run(optimizer, params, 2)
    assert not torch.equal(params[0], still)


@pytest.mark.parametrize("rule", RULES)
def test_weights_loaded_off_the_sphere_return_to_it_at_the_next_step(rule):
    params, scaled = weights(), weights()
    one, other = (RULES[rule]([{"params": p, "manifold": True}]) for p in (params, scaled))
    with torch.no_grad():
        for p in scaled:
            p.mul_(7)
    for optimizer, moved in ((one, params), (other, scaled)):
        for p, q in zip(moved, weights(seed=3), strict=True):
            p.grad = 0.01 * q.detach()
        optimizer.step()
    assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(params, scaled, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_compiled_step_equals_the_eager_one(rule):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = weights(torch.float32)
        optimizer = RULES[rule]([{"params": params, "manifold": True}])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for index in range(3):
            gradients(params, index)
            step()
        results.append(params)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_compiled_steps_of_several_groups_off_the_sphere_equal_the_eager_ones(rule):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = [nn.Parameter(torch.zeros(size)) for size in (2, 3, 4)]
        sphere = {"params": [nn.Parameter(torch.eye(2))], "manifold": True}
        optimizer = RULES[rule]([*({"params": [p], "manifold": False} for p in params), sphere])
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            for size, p in enumerate(params, start=1):
                p.grad = torch.full_like(p, 10.0**size)
            step()
        results.append(params)
    assert all(torch.allclose(p, q, rtol=1e-6, atol=0) for p, q in zip(*results, strict=True))


def test_a_gradient_whose_length_overflows_leaves_the_filter_finite():
    for foreach in (False, True):
        weight = nn.Parameter(torch.eye(3))
        optimizer = AdamG([{"params": [weight], "manifold": True}], lr=0.1, foreach=foreach)
        weight.grad = torch.tensor([[0.0, 1e20, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
        optimizer.step()
        assert weight.isfinite().all()
        assert all(t.isfinite().all() for t in optimizer.state[weight].values() if torch.is_tensor(t))


def test_sparse_gradients_are_refused_with_the_remedy():
    layer = nn.Embedding(4, 3, sparse=True)
    sphere = {"params": [nn.Parameter(torch.eye(2))], "manifold": True}
    optimizer = SGDG([{"params": list(layer.parameters()), "manifold": False}, sphere])
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(4, 3\) are sparse.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [nn.Parameter(torch.ones(3))]}, r"shape \(3,\).*manifold=False"),
        ({"params": [nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))]}, "filter 1 .1 in all. has length 0.0"),
        ({"params": [nn.Parameter(torch.full((1, 2), math.nan))]}, "filter 0 .* has length nan"),
        ({"params": [nn.Parameter(torch.ones(1, 2))], "max_norm": 0.0}, "math.inf for no bound"),
        ({"params": [nn.Parameter(torch.ones(1, 2))], "lr": -0.1}, "group 1: lr=-0.1 must be between 0"),
        ({"params": [("conv.weight", nn.Parameter(torch.zeros(1, 2)))]}, "group 0, parameter conv.weight: filter 0"),
    ],
)
def test_bad_groups_are_named_and_nothing_is_touched(group, message):
    good = nn.Parameter(torch.full((2, 2), 3.0))
    groups = [{"params": [good], "manifold": True}, {**group, "manifold": True}]
    with pytest.raises(ValueError, match=message):
        SGDG(groups[1:] if "group 0" in message else groups)
    assert torch.equal(good.detach(), torch.full((2, 2), 3.0))
    optimizer = SGDG(groups[:1])
    if "group 0" not in message:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_without_a_manifold_group_says_so():
    with pytest.warns(UserWarning, match="no group has manifold=True"):
        SGDG([nn.Parameter(torch.ones(2, 2))])


def test_filters_added_later_are_brought_to_length_one():
    optimizer = SGDG([{"params": [nn.Parameter(torch.ones(1, 4))], "manifold": True}])
    late = nn.Parameter(torch.full((2, 4), 3.0))
    optimizer.add_param_group({"params": [late], "manifold": True})
    assert torch.equal(late.detach(), torch.full((2, 4), 0.5))


@pytest.mark.parametrize("rule", RULES)
def test_the_state_of_another_optimizer_is_refused_with_the_remedy(rule):
    params = weights()
    other = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    run(other, params, 1)
    optimizer = RULES[rule]([{"params": params, "manifold": True}])
    with pytest.raises(ValueError, match=r"group 0 of the state has no .*manifold.* another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert "manifold" in optimizer.param_groups[0]


@pytest.mark.parametrize("rule", RULES)
def test_complex_parameters_train_beside_the_sphere(rule):
    beside = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = RULES[rule]([{"params": weights()[:1], "manifold": True}, {"params": [beside], "lr": 0.1}])
    beside.grad = torch.full((3,), 1j, dtype=torch.complex64)
    optimizer.step()
    torch.testing.assert_close(beside.detach(), torch.full((3,), 1 - 0.19j, dtype=torch.complex64))
