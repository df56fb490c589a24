"""Attaching to an optimizer's step: all or nothing, and along with every copy of model and optimizer."""

import copy
import io
import pickle

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import normkit
from normkit.optim.step_hooks import attach_to_step

ATTACHING = ("bnp", "bnp-paper", "group+bnp", "batchless", "batchless-adam", "batchless-projected")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)),
    ).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return 3 * torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64) + 2


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def state(model, optimizer):
    return [*model.state_dict().values(), *torch.utils._pytree.tree_leaves(optimizer.state_dict())]


def same(a, b):
    pairs = zip(state(*a), state(*b), strict=True)
    return all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in pairs)


def through_a_file(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair)), "save": through_a_file}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in ATTACHING for how in COPIES),
        ("normalizer-free", "deepcopy"),
    ],  # torch pickles no parametrization
)
def test_model_and_optimizer_copied_together_train_on_identically(name, how):
    pair = normkit.apply(name, network(), lr=0.02)
    train(*pair, range(3))
    pair[0](batch(3)).square().mean().backward()  # copies have no gradients, and so no rows
    twin = COPIES[how](pair)
    again = COPIES[how](twin[::-1])[::-1]  # a copy of the copy, the optimizer first
    for model, optimizer in (pair, twin, again):
        if model is pair[0]:
            optimizer.zero_grad()
        model(batch(4)).square().mean().backward()
        optimizer.step()
        train(model, optimizer, range(5, 8))
    assert same(pair, twin)
    assert same(pair, again)
    plain = normkit.apply(name, network(), lr=0.02)
    train(*plain, range(3))
    assert not same(pair, plain)


@pytest.mark.parametrize("name", ATTACHING)
def test_a_model_that_is_copied_alone_says_so_at_its_first_step(name):
    model, optimizer = normkit.apply(name, network(), lr=0.02)
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    other = SGD([p for p in twin.parameters() if p.requires_grad], lr=0.02)
    with pytest.warns(
        UserWarning, match=r"copy both together, copy\.deepcopy\(\(model, optimizer\)\), or call normkit"
    ):
        train(twin, other, range(1))
    train(twin, other, range(1, 3))  # once
    train(model, optimizer, range(2, 4))


def test_the_handle_of_a_copy_is_the_copys():
    pair = normkit.apply("bnp", network(), lr=0.02)
    train(*pair, range(2))
    model, optimizer = copy.deepcopy(pair)
    ours, theirs = normkit.handle(optimizer), normkit.handle(pair[1])
    assert ours is not theirs
    assert normkit.describe(model, optimizer).summary == normkit.describe(*pair).summary
    train(model, optimizer, range(2, 3))
    assert {float(entry["steps"]) for entry in ours.state_dict().values()} == {3.0}
    assert {float(entry["steps"]) for entry in theirs.state_dict().values()} == {2.0}


def test_the_langevin_sampler_goes_on_in_a_copy():
    model = nn.Linear(3, 1)
    sampler = normkit.LangevinBNP(normkit.BNP(model), model.parameters(), lr=1e-3)
    pair = model, sampler
    twin, theirs = copy.deepcopy(pair)
    for sampled, optimizer in (pair, (twin, theirs)):
        sampled(torch.arange(12.0).view(4, 3)).sum().backward()
        torch.manual_seed(1)
        optimizer.step()
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("name", [*ATTACHING, "sgd-g"])
def test_the_order_of_zero_grad_and_forward_does_not_matter(name):
    ends = []
    for order in ("before", "between", "closure"):
        model, optimizer = normkit.apply(name, network(), lr=0.02)
        for step in range(5):

            def closure(model=model, optimizer=optimizer, step=step, late=order != "before"):
                loss = model(batch(step)).square().mean()
                if late:
                    optimizer.zero_grad()
                loss.backward()
                return loss

            if order == "closure":
                optimizer.step(closure)
            else:
                if order == "before":
                    optimizer.zero_grad()
                closure()
                optimizer.step()
        ends.append((model, optimizer))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("name", ATTACHING)
def test_a_derivative_inside_the_loss_takes_no_rows(name):
    ends = []
    for late in (False, True):
        model, optimizer = normkit.apply(name, network(), lr=0.02)
        for step in range(5):
            if not late:
                optimizer.zero_grad()
            z = batch(step).requires_grad_()
            u = model(z)
            (du,) = torch.autograd.grad(u.sum(), z, create_graph=True)
            if late:
                optimizer.zero_grad()
            (du.square().sum() + u.square().mean()).backward()
            optimizer.step()
        ends.append((model, optimizer))
        steps = [float(entry["steps"]) for entry in optimizer.state_dict().get("bnp", {}).values()]
        assert all(n == 5 for n in steps)
        means = [t for key, t in model.state_dict().items() if key.endswith("running_mean")]
        assert steps or all((t != 0).all() for t in means)
    assert same(*ends)


class SAM(Optimizer):
    """The usual two-step design."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.base = SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("to", ["none", "batchless"])
def test_of_two_gradients_per_step_the_one_that_moves_the_weights_counts(to):
    model = normkit.convert(network(), to)
    optimizer = SAM(trainable(model), 0.01)
    bnp = normkit.BNP(model, statistics="channels") if to == "none" else None
    attach = bnp.attach if bnp else (lambda o: normkit.attach(model, o))
    with pytest.raises(
        ValueError, match=r"SAM: it works on two gradients.*attach to the optimizer inside it, optimizer\.base"
    ):
        attach(optimizer)
    attach(optimizer.base)
    model(batch(0)).square().mean().backward()
    optimizer.first_step()
    model(batch(1) + 5).square().mean().backward()
    if to == "none":
        optimizer.second_step()
        counted = optimizer.base.state_dict()["bnp"]["0"]["mean"]
        assert torch.allclose(counted, (batch(1) + 5).mean((0, 2, 3)))
    else:
        first = next(m for m in model.modules() if hasattr(m, "running_mean"))
        mean, seen = first.running_mean.clone(), model[0](batch(1) + 5).mean((0, 2, 3))
        moved = mean + 0.07 * 8 / (8 + 6) * (seen - mean)
        optimizer.second_step()
        assert torch.allclose(first.running_mean, moved)


@pytest.mark.parametrize("to", ["none", "batchless"])
def test_a_wrapper_without_a_torch_optimizers_hooks_is_refused_and_nothing_is_left_of_the_attempt(to):
    ends = []
    for wrong_first in (False, True):
        model = normkit.convert(network(), to)
        inner = SGD(trainable(model), lr=0.01)
        outer = pytorch_optimizer.Lookahead(inner)
        bnp = normkit.BNP(model) if to == "none" else None
        attach = bnp.attach if bnp else (lambda o, model=model: normkit.attach(model, o))
        if wrong_first:
            with pytest.raises(ValueError, match=r"Lookahead: it lacks hooks.*optimizer\.optimizer"):
                attach(outer)
        attach(inner)
        train(model, outer, range(3))
        ends.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "wrapper", ["Lookahead", "OrthoGrad", "TRAC", "PCGrad", "ScheduleFreeWrapper", "DynamicLossScaler"]
)
@pytest.mark.parametrize("to", ["none", "batchless"])
def test_every_wrapper_is_refused_in_one_line_with_the_optimizer_to_attach_to(to, wrapper):
    model = normkit.convert(network(), to)
    outer = getattr(pytorch_optimizer, wrapper)(SGD(trainable(model), lr=0.01))
    attach = normkit.BNP(model).attach if to == "none" else (lambda o: normkit.attach(model, o))
    with pytest.raises(ValueError, match=rf"{wrapper}: it lacks hooks.*attach to the optimizer inside it, optimizer\."):
        attach(outer)


def test_weights_are_preconditioned_by_one_optimizer_at_a_time():
    model = normkit.convert(network(), "none")
    first, second = (SGD(model.parameters(), lr=0.1) for _ in range(2))
    bnp = normkit.BNP(model)
    handle = bnp.attach(first)
    with pytest.raises(ValueError, match="0: its weight is attached already, to another optimizer"):
        bnp.attach(second)
    handle.remove()
    bnp.attach(second)


@pytest.mark.parametrize("name", ATTACHING)
def test_an_optimizer_that_never_steps_is_noticed(name):
    model, optimizer = normkit.apply(name, network(), lr=0.02)

    def run(step):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()

    for step in range(7):
        run(step)
    with pytest.warns(UserWarning, match="8 backward passes, each followed by zero_grad, and no step"):
        run(7)
    for step in range(8, 18):
        run(step)


def test_all_hooks_go_and_others_stay():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1)
    before = dict(vars(optimizer))
    calls = []
    handles = [attach_to_step(optimizer, key, lambda _, key=key: calls.append(key)) for key in "abc"]
    handles[1].remove()
    handles[1].remove()
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["a", "c"]
    optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    assert {k: v for k, v in vars(optimizer).items() if k != "zero_grad"} == before
    pickle.dumps(optimizer)


@pytest.mark.parametrize("name", ["bnp", "batchless", "normalizer-free"])
def test_who_sees_inputs_beside_private_gradients_says_so_once(name, recwarn):
    model, optimizer = normkit.apply(name, network(), lr=0.02)
    for parameter in model.parameters():
        parameter.grad_sample = None  # as Opacus marks them
    train(model, optimizer, range(2))
    said = [w for w in recwarn if "the privacy guarantee does not cover them" in str(w.message)]
    assert len(said) == (name != "normalizer-free")
