"""Curvature against the full Hessian by autograd, in float64, and against curvlinops where it is installed."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from normkit.instruments import curvature
from tests.cases import batch_loss


def problem(norm):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(4)] if norm else []
    net = nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3)).double()
    batch = torch.randn(20, 3, dtype=torch.float64), torch.randint(3, (20,))
    return net, batch


def hessian(net, batch):
    """The full Hessian by double backward, its row blocks in the order of the parameters."""
    names = [name for name, _ in net.named_parameters()]
    values = tuple(p.detach() for p in net.parameters())
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def f(*parameters):
        state = {**dict(zip(names, parameters, strict=True)), **{k: b.clone() for k, b in buffers.items()}}
        x, y = batch
        return nn.functional.cross_entropy(functional_call(net, state, (x,)), y)

    blocks = torch.autograd.functional.hessian(f, values)
    sizes = [v.numel() for v in values]
    rows = [
        torch.cat([block.reshape(a, b) for block, b in zip(row, sizes, strict=True)], 1)
        for row, a in zip(blocks, sizes, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("norm", [False, True])
def test_directional_curvature_and_stability_equal_those_of_the_hessian(norm):
    net, batch = problem(norm)
    H = hessian(net, batch)
    g = torch.cat([x.flatten() for x in torch.autograd.grad(batch_loss(net, batch), list(net.parameters()))])
    found = curvature(net, batch_loss, batch, lr=0.3)
    expected = (g @ H @ g / g.square().sum()).item()
    assert found.directional == pytest.approx(expected, rel=1e-7)
    assert found.stability == pytest.approx(0.15 * expected, rel=1e-7)
    assert found.gradient_norm == pytest.approx(g.norm().item(), rel=1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_largest_eigenvalue_and_trace_equal_those_of_the_hessian(norm):
    net, batch = problem(norm)
    H = hessian(net, batch)
    found = curvature(net, batch_loss, batch, power_iterations=300, trace_samples=400).whole
    assert found.lambda_max == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-4)
    assert found.residual < 1e-3
    assert abs(found.trace - H.trace().item()) < 4 * found.trace_error
    assert found.trace_error < 0.2 * abs(H.trace().item())


def test_layers_are_the_diagonal_blocks():
    net, batch = problem(True)
    H = hessian(net, batch)
    found = curvature(net, batch_loss, batch, power_iterations=300, trace_samples=300, per_layer=True).layers
    start = 0
    assert list(found) == ["0", "1", "3"]
    for name, spectrum in found.items():
        size = sum(p.numel() for p in net[int(name)].parameters())
        block = H[start : start + size, start : start + size]
        start += size
        assert spectrum.lambda_max == pytest.approx(torch.linalg.eigvalsh(block)[-1].item(), rel=2e-3)
        assert abs(spectrum.trace - block.trace().item()) < 4 * spectrum.trace_error


def test_a_warm_start_needs_fewer_iterations():
    net, batch = problem(True)
    first = curvature(net, batch_loss, batch, power_iterations=300)
    cold = curvature(net, batch_loss, batch, power_iterations=2)
    warm = curvature(net, batch_loss, batch, power_iterations=2, start=first)
    assert abs(warm.whole.lambda_max - first.whole.lambda_max) < 1e-3 * first.whole.lambda_max
    assert warm.whole.residual < cold.whole.residual / 10


def test_the_largest_eigenvalue_is_found_below_a_larger_negative_one():
    net = nn.Linear(3, 1, bias=False).double()
    eigenvalues = torch.tensor([-5.0, 1.0, 2.0], dtype=torch.float64)
    found = curvature(net, lambda m, _: (eigenvalues * m.weight.square()).sum() / 2, None, power_iterations=200)
    assert found.whole.lambda_max == pytest.approx(2.0, rel=1e-3)


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    net = nn.Linear(3, 1, bias=False).double()
    eigenvalues = torch.tensor([-5.0, 1.0, 2.0], dtype=torch.float64)
    found = curvature(net, lambda m, _: (eigenvalues * m.weight.square()).sum() / 2, None, trace_samples=2).whole
    assert found.trace == pytest.approx(-2.0, abs=1e-6)


def test_train_and_eval_mode_have_their_own_curvature():
    net, batch = problem(True)
    H = {}
    for mode in (True, False):
        net.train(mode)
        H[mode] = torch.linalg.eigvalsh(hessian(net, batch))[-1].item()
        found = curvature(net, batch_loss, batch, power_iterations=300)
        assert found.whole.lambda_max == pytest.approx(H[mode], rel=1e-3)
    assert not math.isclose(H[True], H[False], rel_tol=0.05)


def test_single_precision_is_good_to_a_percent():
    net, batch = problem(True)
    exact = curvature(net, batch_loss, batch).directional
    single = curvature(net.float(), batch_loss, (batch[0].float(), batch[1])).directional
    assert single == pytest.approx(exact, rel=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its use of torch.jit
def test_curvlinops_finds_the_same_largest_eigenvalue():
    curvlinops = pytest.importorskip(
        "curvlinops", reason="not in the test extra: curvlinops brings torchvision, which has no build for this torch"
    )
    from scipy.sparse.linalg import eigsh

    net, batch = problem(False)
    operator = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [batch], check_deterministic=False
    )
    (expected,) = eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)
    found = curvature(net, batch_loss, batch, power_iterations=300)
    assert found.whole.lambda_max == pytest.approx(float(expected), rel=1e-4)
