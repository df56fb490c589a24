"""The pure functions of batch normalization preconditioning against slow references in float64."""

import copy
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normkit
import normkit.moments as moments_module
from normkit import BNP
from normkit.functional import (
    bounding_factors,
    guarded_variance,
    precondition,
    step_divisor,
    unit_changes,
    update_running,
)
from normkit.methods.bnp.observer import geometry
from normkit.methods.bnp.preconditioning import implied_bias_grad, into_z_
from normkit.moments import observe, sum_and_square_sum, weighted_sums
from normkit.optim.weight_rows import Layout

CASES = {
    "linear": (lambda bias: nn.Linear(5, 4, bias=bias), (7, 5)),
    "linear on tokens": (lambda bias: nn.Linear(5, 4, bias=bias), (3, 6, 5)),
    "conv1d": (lambda bias: nn.Conv1d(3, 4, 3, padding=1, bias=bias), (5, 3, 9)),
    "conv2d": (lambda bias: nn.Conv2d(3, 4, 3, bias=bias), (5, 3, 6, 7)),
    "conv2d, padded": (lambda bias: nn.Conv2d(3, 4, (3, 5), padding=(1, 2), bias=bias), (5, 3, 4, 6)),
    "conv2d, padded to the same size": (
        lambda bias: nn.Conv2d(3, 4, (3, 5), padding="same", dilation=2, bias=bias),
        (5, 3, 4, 6),
    ),
    "conv2d, strided and dilated": (
        lambda bias: nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=2, bias=bias),
        (5, 3, 8, 9),
    ),
    "conv2d, grouped": (lambda bias: nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=bias), (5, 6, 5, 5)),
    "conv2d, depthwise": (lambda bias: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=bias), (5, 4, 5, 5)),
    "conv3d": (lambda bias: nn.Conv3d(2, 3, 2, padding=1, bias=bias), (3, 2, 4, 3, 5)),
    "transposed conv1d": (lambda bias: nn.ConvTranspose1d(3, 4, 3, stride=2, bias=bias), (5, 3, 6)),
    "transposed conv2d": (lambda bias: nn.ConvTranspose2d(3, 4, 2, stride=2, bias=bias), (5, 3, 4, 4)),
    "transposed conv2d, grouped": (
        lambda bias: nn.ConvTranspose2d(6, 4, (4, 3), stride=(2, 1), padding=1, groups=2, bias=bias),
        (5, 6, 4, 4),
    ),
    "transposed conv3d": (lambda bias: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=bias), (3, 2, 3, 2, 3)),
}


@pytest.fixture(params=CASES, name="case")
def _case(request):
    make, shape = CASES[request.param]
    torch.manual_seed(0)
    x = 3 + torch.randn(shape, dtype=torch.float64) * 2
    return make, x


def rows(layer, x):
    """The layer's design matrix per group, (rows, channels of the group, taps), with zeros of every kind."""
    if isinstance(layer, nn.Linear):
        return [x.reshape(-1, x.shape[-1], 1)]
    spatial = x.dim() - 2
    if geometry(layer).transposed:
        big = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)))
        big[(..., *(slice(None, None, s) for s in layer.stride))] = x
        edge = [d * (k - 1) - p for d, k, p in zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)]
        x, pads, stride = big, [p for e in reversed(edge) for p in (e, e)], (1,) * spatial
    else:
        pads, stride = layer._reversed_padding_repeated_twice, layer.stride
    x = F.pad(x, pads)
    for d in range(spatial):  # every window of each dimension, its taps last
        span = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, span, stride[d])[..., :: layer.dilation[d]]
    x = x.movedim(1, 1 + spatial).reshape(-1, x.shape[1], prod(layer.kernel_size))
    return list(x.chunk(geometry(layer).groups, dim=1))


def matrices(layer, weight):
    """The weight as one matrix per group, (outputs, channels, taps), with which :func:`rows` is multiplied."""
    if not geometry(layer).transposed:
        return list(weight.reshape(weight.shape[0], weight.shape[1], -1).chunk(geometry(layer).groups))
    flipped = weight.flip(tuple(range(2, weight.dim()))).flatten(2)
    return [part.transpose(0, 1) for part in flipped.chunk(geometry(layer).groups)]


def outputs(layer, x, weight, bias):
    parts = [torch.einsum("rct,oct->ro", r, w) for r, w in zip(rows(layer, x), matrices(layer, weight), strict=True)]
    return torch.cat(parts, 1) + (0 if bias is None else bias)


def loss_of(a):
    """Any loss that is a sum over output positions; ``a`` is (positions, units)."""
    return (torch.sin(a) * torch.arange(1.0, 1 + a.shape[1], dtype=a.dtype)).square().mean()


def positions_first(layer, a):
    return a.movedim(geometry(layer).feature_dim, -1).reshape(-1, a.shape[geometry(layer).feature_dim])


def statistics(features):
    return torch.linspace(-1, 4, features, dtype=torch.float64), torch.linspace(0.3, 5, features, dtype=torch.float64)


def test_the_reference_rows_reproduce_the_layer(case):
    make, x = case
    layer = make(True).double()
    expected = positions_first(layer, layer(x))
    assert torch.allclose(outputs(layer, x, layer.weight, layer.bias), expected, rtol=1e-12, atol=1e-12)


def test_a_step_is_the_step_on_the_reparametrized_layer_mapped_back(case):
    make, x = case
    layer, lr = make(True).double(), 0.1
    mean, variance = statistics(geometry(layer).features)
    loss_of(positions_first(layer, layer(x))).backward()
    new_weight, new_bias = precondition(
        layer.weight.grad,
        layer.bias.grad,
        mean,
        variance,
        groups=geometry(layer).groups,
        transposed=geometry(layer).transposed,
    )

    # the layer a = beta + z . (h - mu) / sqrt(s), whose rows are normalized explicitly
    means, sigmas = mean.chunk(geometry(layer).groups), variance.sqrt().chunk(geometry(layer).groups)
    normal = [(r - m[:, None]) / s[:, None] for r, m, s in zip(rows(layer, x), means, sigmas, strict=True)]
    weights = matrices(layer, layer.weight.detach())
    z = [(w * s[:, None]).requires_grad_() for w, s in zip(weights, sigmas, strict=True)]
    shift = torch.cat([(w * m[:, None]).sum((1, 2)) for w, m in zip(weights, means, strict=True)])
    beta = (layer.bias.detach() + shift).requires_grad_()
    a = torch.cat([torch.einsum("rct,oct->ro", r, w) for r, w in zip(normal, z, strict=True)], 1) + beta
    loss_of(a).backward()
    stepped = [(w - lr * w.grad) / s[:, None] for w, s in zip(z, sigmas, strict=True)]
    shift = torch.cat([(w * m[:, None]).sum((1, 2)) for w, m in zip(stepped, means, strict=True)])
    expected_bias = beta - lr * beta.grad - shift

    ours = matrices(layer, layer.weight.detach() - lr * new_weight)
    for mine, reference in zip(ours, stepped, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12, atol=1e-13)
    assert torch.allclose(layer.bias - lr * new_bias, expected_bias, rtol=1e-12, atol=1e-13)


def test_without_bias_the_metric_is_restricted_to_the_weight(case):
    make, x = case
    layer = make(False).double()
    shape = geometry(layer)
    mean, variance = statistics(shape.features)
    loss_of(positions_first(layer, layer(x))).backward()
    ours, none = precondition(
        layer.weight.grad, None, mean, variance, groups=shape.groups, transposed=shape.transposed, divisor=3.0
    )
    assert none is None
    taps = shape.fan_in * shape.groups // shape.features
    grads = matrices(layer, layer.weight.grad)
    for mine, g, m, s in zip(
        matrices(layer, ours), grads, mean.chunk(shape.groups), variance.chunk(shape.groups), strict=True
    ):
        mu = m.repeat_interleave(taps)
        metric = torch.diag(s.repeat_interleave(taps)) + torch.outer(mu, mu)
        expected = torch.linalg.solve(metric, g.reshape(len(g), -1).T).T / 3
        assert torch.allclose(mine.reshape(len(g), -1), expected, rtol=1e-10, atol=1e-13)


def test_the_preconditioned_gradient_is_a_descent_direction_in_every_form():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        w, b = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
        mean, variance = 5 * torch.randn(6, generator=generator), torch.rand(6, generator=generator) + 0.01
        new_w, new_b = precondition(w, b, mean, variance)
        assert (new_w * w).sum() + (new_b * b).sum() > 0
        for removed in (True, False):
            assert (precondition(w, None, mean, variance, mean_removed=removed)[0] * w).sum() > 0


def metric_of(mean, variance):
    """``P P^T`` as a matrix over ``(b, w)``, found by applying the function to unit gradients."""
    units = torch.eye(len(mean) + 1, dtype=mean.dtype)
    w, b = precondition(units[:, 1:], units[:, 0], mean, variance)
    return torch.cat([b[:, None], w], 1)


def test_the_metric_is_p_times_its_transpose():
    mean, variance = statistics(6)
    u = torch.eye(7, dtype=torch.float64)
    u[0, 1:] = -mean
    p = u @ torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), variance.rsqrt()]))
    assert torch.allclose(metric_of(mean, variance), p @ p.T, rtol=1e-13, atol=1e-13)


def test_preconditioning_improves_the_condition_number_as_the_theory_says():
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(50, 6, dtype=torch.float64, generator=generator) * torch.logspace(-2, 2, 6, dtype=torch.float64)
    h = h @ torch.randn(6, 6, dtype=torch.float64, generator=generator).triu() + torch.linspace(-9, 9, 6)
    rows_ = torch.cat([torch.ones(50, 1, dtype=torch.float64), h], 1)
    mean, variance = h.mean(0), h.var(0, correction=0)
    u = torch.eye(7, dtype=torch.float64)
    u[0, 1:] = -mean
    p = u @ torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), variance.rsqrt()]))

    second_moment = p.T @ (rows_.T @ rows_ / 50) @ p
    expected = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.corrcoef(h.T))
    assert torch.allclose(second_moment, expected, rtol=1e-9, atol=1e-9)

    kappa = torch.linalg.cond
    assert kappa(rows_ @ u) <= kappa(rows_)
    scalings = 10 ** (4 * torch.rand(300, 7, dtype=torch.float64, generator=generator) - 2)
    best = min(
        kappa(rows_ @ u @ torch.diag(d)) for d in [*scalings, variance.rsqrt().new_ones(7), *scalings.reciprocal()]
    )
    assert kappa(rows_ @ p) <= 7**0.5 * best


def test_the_gradient_of_a_bias_before_batch_normalization_vanishes_and_so_does_the_centring_term():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, padding=1).double(), nn.BatchNorm2d(4).double()
    loss_of(positions_first(conv, norm(conv(5 + torch.randn(6, 3, 5, 5, dtype=torch.float64))))).backward()
    mean, variance = statistics(3)
    centred, _ = precondition(conv.weight.grad, conv.bias.grad, mean, variance)
    scaled, _ = precondition(conv.weight.grad, None, mean, variance, mean_removed=True)
    assert conv.bias.grad.abs().max() < 1e-15
    assert torch.allclose(centred, scaled, rtol=1e-12, atol=1e-15)
    assert torch.allclose(scaled, conv.weight.grad / variance.reshape(1, -1, 1, 1), rtol=1e-15)


def test_statistics_of_patches_are_those_of_the_design_matrix(case):
    make, x = case
    layer = make(True).double()
    bnp = BNP(layer)
    layer(x).sum().backward()
    bnp.precondition_()
    design = torch.cat(rows(layer, x), 1).transpose(1, 2).flatten(0, 1)  # patches and taps, channels
    state = bnp.state_dict()[""]
    assert torch.allclose(state["mean"], design.mean(0), rtol=1e-12, atol=1e-13)
    assert torch.allclose(state["variance"], design.var(0, correction=0), rtol=1e-12, atol=1e-13)


PADDED = {
    f"{mode}, {name}": (mode, make)
    for mode in ("zeros", "reflect", "replicate", "circular")
    for name, make in {
        "1d": lambda mode: (nn.Conv1d(2, 3, 4, padding=3, dilation=2, padding_mode=mode), (3, 2, 9)),
        "2d": lambda mode: (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 1), padding_mode=mode), (3, 2, 6, 5)),
        "same": lambda mode: (nn.Conv2d(2, 3, (3, 5), padding="same", padding_mode=mode), (3, 2, 5, 7)),
        "3d": lambda mode: (nn.Conv3d(2, 3, 3, padding=1, padding_mode=mode), (2, 2, 3, 4, 5)),
    }.items()
}
TRANSPOSED = {
    "transposed, output padding": lambda: (nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1), (3, 2, 4, 5)),
    "transposed, dilated": lambda: (nn.ConvTranspose1d(2, 3, 3, 3, 2, dilation=2), (3, 2, 6)),
}


def met(layer, x):
    """What the taps of a unit meet, ``(patches, channels, taps)``: the gradients of its outputs, zeros and all."""
    y = layer(x)
    unit = y.movedim(1, 0)[0].flatten()
    gradients = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0] for value in unit]
    patches = torch.stack([g[:, 0] if layer.transposed else g[0] for g in gradients])
    return patches.flatten(2)


@pytest.mark.parametrize("name", [*PADDED, *TRANSPOSED])
@pytest.mark.parametrize("statistics", ["patches", "channels"])
def test_statistics_of_a_convolution_are_of_what_its_taps_meet_or_of_its_input(name, statistics):
    layer, shape = TRANSPOSED[name]() if name in TRANSPOSED else PADDED[name][1](PADDED[name][0])
    layer = layer.double()
    x = 3 + torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = met(layer, x) if statistics == "patches" else x.flatten(2)
    bnp = BNP(layer, statistics=statistics)
    layer(x).sum().backward()
    bnp.precondition_()
    state = bnp.state_dict()[""]
    assert torch.allclose(state["mean"], expected.mean((0, 2)), rtol=1e-12)
    assert torch.allclose(state["variance"], expected.transpose(0, 1).flatten(1).var(1, correction=0), rtol=1e-12)


def test_masked_positions_leave_the_patches():
    layer = nn.Conv1d(2, 3, 3).double()
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([8, 5, 6])[:, None]
    kept = met(layer, mask[:, None].expand(3, 2, 8).double()).bool()
    values = met(layer, x)
    bnp = BNP(layer)
    with bnp.masked(mask):
        layer(torch.where(mask[:, None], x, 1e6)).sum().backward()
    bnp.precondition_()
    expected = torch.stack([values[:, c][kept[:, c]] for c in range(2)])
    state = bnp.state_dict()[""]
    assert torch.allclose(state["mean"], expected.mean(1), rtol=1e-12)
    assert torch.allclose(state["variance"], expected.var(1, correction=0), rtol=1e-12)


def test_the_published_form_starts_at_0_and_1_and_knows_the_variance_within_a_step_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2)).double()
    model, optimizer = normkit.apply("bnp-paper", model, lr=0.0)
    inputs = torch.randn(5, 1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.zeros(2).double(), torch.ones(2).double()
    for x in inputs:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = 0.99 * mean + 0.01 * x.mean((0, 2, 3))
        variance = 0.99 * variance + 0.01 * x.var((0, 2, 3), correction=0)
    state = optimizer.state_dict()["bnp"]
    assert torch.allclose(state["0"]["mean"], mean, rtol=1e-12)
    assert torch.allclose(state["0"]["variance"], variance, rtol=1e-12)
    # one row has no variance of its own: at batch size 1 that of a linear layer fades, and its gradients grow without end
    assert torch.allclose(state["2"]["variance"], torch.full((48,), 0.99**5, dtype=torch.float64), rtol=1e-12)


class Reads(TorchDispatchMode):
    """Elements that operations read and write, of tensors as large as the input."""

    def __init__(self, size):
        super().__init__()
        self.size, self.reads, self.writes = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not func.is_view and func is not torch.ops.aten.detach.default:
            # one pass over a tensor that is given twice
            self.reads += len({t.data_ptr() for t in leaves if t.numel() >= self.size})
            self.writes += sum(t.numel() >= self.size for t in made)
        return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weighted_sums_read_the_input_once_and_write_nothing_of_its_size(memory_format):
    x = torch.randn(17, 64, 32, 32).contiguous(memory_format=memory_format)
    weights = torch.rand(32, 32)
    with Reads(x.numel()) as counted:
        total, square = weighted_sums(x, weights)
    assert (counted.reads, counted.writes) == (1, 0)
    wide = x.double() * weights
    assert torch.allclose(total.double(), wide.sum((0, 2, 3)), rtol=1e-5, atol=1e-2)
    assert torch.allclose(square.double(), (wide * x).sum((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 6, 4), (5, 16, 6, 4), (1, 3, 6, 4), (5, 1, 6, 4)])
def test_weighted_sums_of_small_inputs_weigh_each_position(shape, memory_format):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    weights = torch.rand(shape[2:], dtype=torch.float64)
    total, square = weighted_sums(x, weights)
    assert torch.allclose(total, (x * weights).sum((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(square, (x.square() * weights).sum((0, 2, 3)), rtol=1e-12)


def test_zeros_that_stride_inserts_are_what_conditions_a_transposed_convolution():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 4, 2, stride=2).double()
    x = 5 + torch.randn(16, 3, 4, 4, dtype=torch.float64)
    design = rows(layer, x)[0].flatten(1)
    design = torch.cat([torch.ones(len(design), 1, dtype=x.dtype), design], 1)

    def kappa(mean, second):
        metric = metric_of(mean.repeat_interleave(4), (second - mean.square()).repeat_interleave(4))
        values = torch.linalg.eigvals(metric @ (design.T @ design)).real
        return values.max() / values.min()

    mean, second = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
    raw = torch.linalg.cond(design.T @ design)
    assert kappa(mean / 4, second / 4) < min(kappa(mean, second), raw) / 10


def test_no_feature_gains_more_than_the_guard_allows():
    variance = torch.tensor([0.0, 1e-9, 4.0], dtype=torch.float64)
    guarded = guarded_variance(variance)
    assert torch.allclose(guarded, variance + 0.0401)
    assert guarded[2] / guarded[0] < 101


def test_the_divisor_keeps_the_largest_eigenvalue_bounded():
    torch.manual_seed(0)
    for n, positions in [(400, 1), (400, 20), (400, 400), (20, 400)]:
        normal = torch.randn(positions, n, dtype=torch.float64)
        gram = torch.linalg.eigvalsh(normal @ normal.T / positions).max()
        q2 = step_divisor(float(n), torch.tensor(float(positions)))
        assert gram / q2 <= 4.5, "(1 + sqrt(n / N))^2 / max(n / N, 1) is at most 4"


def test_running_statistics_of_single_rows_are_those_of_the_weighted_mixture():
    torch.manual_seed(0)
    data = 7 + torch.randn(40, 3, dtype=torch.float64)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for t, row in enumerate(data):
        mean, variance = update_running(mean, variance, row, torch.zeros(3), 1 / (t + 1))
    assert torch.allclose(mean, data.mean(0), rtol=1e-12)
    assert torch.allclose(variance, data.var(0, correction=0), rtol=1e-12), "uniform weights give the plain variance"

    decay = 0.9
    weights = torch.tensor([decay**39] + [(1 - decay) * decay ** (39 - t) for t in range(1, 40)], dtype=torch.float64)
    mean, variance = data[0], torch.zeros(3, dtype=torch.float64)
    for row in data[1:]:
        mean, variance = update_running(mean, variance, row, torch.zeros(3), 1 - decay)
    assert torch.allclose(mean, weights @ data, rtol=1e-12)
    assert torch.allclose(variance, weights @ (data - weights @ data).square(), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bounded_step_changes_no_unit_by_more_than_its_share(case, bias):
    make, x = case
    layer, rate, limit = make(bias).double(), 40.0, 0.1
    shape = geometry(layer)
    layout = {"groups": shape.groups, "transposed": shape.transposed}
    design = rows(layer, x)
    stacked = torch.cat(design, 1)  # (rows, all channels, taps): one mean and variance per channel, over rows and taps
    mean, variance = stacked.mean((0, 2)), stacked.var((0, 2), correction=0)
    loss_of(positions_first(layer, layer(x))).backward()
    grads = layer.weight.grad, layer.bias.grad if bias else None
    ours = precondition(*grads, mean, variance, divisor=2.0, **layout)
    rows_of = Layout(layer.weight.shape, shape.groups, shape.transposed)
    mu, sigma = rows_of.along_in(mean), rows_of.along_in(variance.sqrt())
    weight_grad = rows_of.rows(layer.weight.grad.clone())
    bias_grad = rows_of.units(layer.bias.grad) if bias else implied_bias_grad(weight_grad, mu, 1 / sigma)
    z = into_z_(weight_grad, bias_grad, mu, 1 / sigma)
    changes, spreads = (t.flatten() for t in unit_changes(z, bias_grad, rows_of.rows(layer.weight.detach()), sigma))
    factors = bounding_factors(changes * rate / 2, spreads, limit)

    # the change of an output in root mean square, were the channels and taps uncorrelated as the metric takes them to be
    step, taps = matrices(layer, ours[0]), stacked.shape[2]
    weights = matrices(layer, layer.weight.detach())
    metric = torch.diag(variance.repeat_interleave(taps))
    mu = mean.repeat_interleave(taps)
    change, spread, start = [], [], 0
    for group, (d, w) in enumerate(zip(step, weights, strict=True)):
        size = d[0].numel()
        part = slice(group * size, (group + 1) * size)
        for unit, flat in enumerate(d.reshape(len(d), -1)):
            shift = flat @ mu[part] + (ours[1][start + unit] if bias else 0)
            change.append(rate * (flat @ metric[part, part] @ flat + shift**2).sqrt())
        spread += [(f @ metric[part, part] @ f).sqrt() for f in w.reshape(len(w), -1)]
        start += len(d)
    change, spread = torch.stack(change), torch.stack(spread).clamp(min=0.1)
    assert torch.allclose(factors, (limit * spread / change).clamp(max=1), rtol=1e-9)
    assert (factors < 1).any()
    small = bounding_factors(changes * 1e-9, spreads, limit)
    assert torch.equal(small, torch.ones_like(small)), "steps within the bound are the paper's"


@pytest.mark.parametrize("shape", [(3, 5), (5, 1), (2, 4, 3)])
def test_statistics_of_another_layer_are_refused(shape):
    with pytest.raises(ValueError, match="mean and variance of shape"):
        precondition(torch.zeros(shape), None, torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="bias gradient of shape"):
        precondition(torch.zeros(shape), torch.zeros(7), torch.zeros(shape[1]), torch.ones(shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim", "channels_last"),
    [
        ((6, 3, 5, 4), 1, False),
        ((6, 3, 5, 4), 1, True),
        ((7, 9), -1, False),
        ((2, 7, 9), -1, False),
        ((3, 5, 4), 0, False),
    ],
)
@pytest.mark.parametrize("small", [True, False])
def test_totals_and_moments_agree_in_every_layout(monkeypatch, shape, dim, channels_last, dtype, small):
    monkeypatch.setattr(moments_module, "_SMALL", 1 << 16 if small else 0)
    torch.manual_seed(0)
    x = (2 + torch.randn(shape)).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    rows_ = x.movedim(dim, -1).reshape(-1, x.shape[dim]).double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    total, square = sum_and_square_sum(x, dim)
    moments = observe(x, dim)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(total.double(), rows_.sum(0), rtol=tolerance)
    assert torch.allclose(square.double(), rows_.square().sum(0), rtol=tolerance)
    assert moments.count == len(rows_)
    assert torch.allclose(moments.mean.double(), rows_.mean(0), rtol=tolerance)
    assert torch.allclose(moments.variance.double(), rows_.var(0, correction=0), rtol=tolerance)


def test_moments_of_features_far_from_zero_keep_their_digits():
    torch.manual_seed(0)
    x = 2000 + torch.randn(5000, 3)
    assert torch.allclose(observe(x).variance, x.double().var(0, correction=0).float(), rtol=1e-4)


def test_moments_count_only_the_rows_of_the_mask():
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [2], [1], [4]])
    x[~mask] = float("inf")
    moments = observe(x, -1, mask)
    assert moments.count == 13
    assert torch.allclose(moments.mean, x[mask].mean(0), rtol=1e-12)
    assert torch.allclose(moments.variance, x[mask].var(0, correction=0), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_hundred_steps_of_bnp_are_a_hundred_calls_of_the_pure_functions(bias):
    """What runs joins layers of one shape; what is shown takes one layer at a time."""
    torch.manual_seed(0)
    layers = [
        *(
            nn.Conv2d(3, 4, 3, bias=bias),
            nn.Conv2d(4, 4, 1, groups=2, bias=bias),
            nn.Conv2d(4, 4, 1, groups=2, bias=bias),
        ),
        *(
            nn.ConvTranspose2d(4, 2, 2, bias=bias),
            nn.Flatten(),
            nn.Linear(50, 6, bias=bias),
            nn.Linear(6, 6, bias=bias),
        ),
    ]
    model = nn.Sequential(*layers).double()
    shown = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (model, shown))
    normkit.BNP(model, decay=0.9).attach(optimizer)
    learned = [layer for layer in shown if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
    inputs = {}
    for layer in learned:
        layer.register_forward_hook(lambda layer, args, output: inputs.update({layer: (args[0], output)}))
    running = {}
    for step in range(100):
        x = torch.randn(5, 3, 6, 6, dtype=torch.float64) + 1
        for m, opt in ((model, optimizer), (shown, plain)):
            opt.zero_grad()
            m(x).square().mean().backward()
            if m is shown:
                for layer in learned:
                    shown_step(layer, *inputs[layer], running, weight=max(1 / (step + 1), 1 - 0.9))
            opt.step()
    for ours, theirs in zip(model.parameters(), shown.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def shown_step(layer, x, output, running, *, weight):
    """Precondition one layer's gradient in place, as the docs say it."""
    dim = -1 if isinstance(layer, nn.Linear) else 1
    features, shape = x.shape[dim], geometry(layer)
    seen = observe(torch.cat(rows(layer, x), 1).transpose(1, 2).flatten(0, 1))  # patches and taps, channels
    before = running.get(layer, (torch.zeros(features).double(), torch.ones(features).double()))
    running[layer] = update_running(*before, seen.mean, seen.variance, weight)
    divisor = step_divisor(shape.fan_in, torch.tensor(output.numel() / output.shape[dim]).double())
    grads = precondition(
        layer.weight.grad,
        None if layer.bias is None else layer.bias.grad,
        running[layer][0],
        guarded_variance(running[layer][1]),
        divisor=divisor,
        groups=shape.groups,
        transposed=shape.transposed,
    )
    for p, grad in zip((layer.weight, layer.bias), grads, strict=True):
        if p is not None:
            p.grad.copy_(grad)
