"""One-pass kernels against the readable code; without a GPU in Triton's interpreter (see conftest.py)."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import normkit
from normkit import BatchlessNorm1d, BatchlessNorm2d
from normkit.methods.batchless.functions import affine_map
from normkit.methods.kernels import choice
from normkit.methods.kernels.choice import kernels
from normkit.methods.kernels.rows import rows_of
from normkit.moments import observe, sum_and_square_sum, weighted_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone")
EPS = 1e-5
LAYOUTS = {
    "matrix": (70, 5),
    "sequence": (3, 70, 11),
    "images": (3, 7, 9, 5),
    "many rows": (2, 2, 60, 40),
    "volumes": (2, 3, 4, 5, 3),
}


def inputs(layout, dtype, *, last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(LAYOUTS[layout], generator=generator)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.to(DEVICE, dtype)


def statistics(features):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.rand(features, generator=generator).to(DEVICE) for _ in range(4)]
    return 2.5 + draw[0], 3 + draw[1], 0.5 + draw[2], draw[3] - 0.5


cases = pytest.mark.parametrize(
    ("layout", "dtype", "last"),
    [
        *((layout, torch.float32, False) for layout in LAYOUTS),
        *((layout, torch.float32, True) for layout in ("images", "many rows", "volumes")),
        ("images", torch.bfloat16, False),
        ("images", torch.float16, True),
    ],
)


@needs_triton
@cases
@pytest.mark.parametrize("affine", [True, False])
def test_batchless_forward_gives_output_and_moments_in_one_pass(layout, dtype, last, affine):
    from normkit.methods.batchless.triton_kernel import affine_with_moments

    x = inputs(layout, dtype, last=last)
    mean, variance, weight, bias = statistics(x.shape[1])
    pair = (weight, bias) if affine else (None, None)
    y, moments = affine_with_moments(x, rows_of(x, 1), mean, variance, *pair, EPS)
    wide = [None if t is None else t.double() for t in (x, mean, variance, *pair)]
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, affine_map(*wide, EPS).to(dtype))
    for ours, expected in zip(moments, observe(x.double(), 1), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@needs_triton
@cases
def test_batchless_backward_gives_all_three_gradients_in_one_pass(layout, dtype, last):
    from normkit.methods.batchless.triton_kernel import affine_gradients

    x, dy = inputs(layout, dtype, last=last), inputs(layout, dtype, seed=2)
    mean, variance, weight, bias = statistics(x.shape[1])
    dx, d_gamma, d_beta = affine_gradients(dy, x, rows_of(x, 1), mean, variance, weight, EPS)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    affine_map(wide[0], mean.double(), variance.double(), *wide[1:], EPS).backward(dy.double())
    assert dx.dtype == dtype
    assert dx.stride() == x.stride()
    torch.testing.assert_close(dx, wide[0].grad.to(dtype))
    torch.testing.assert_close(d_gamma.double(), wide[1].grad, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(d_beta.double(), wide[2].grad, rtol=1e-5, atol=1e-3)


@needs_triton
@cases
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_bnp_sums_equal_the_readable_sum_and_square_sum(layout, dtype, last, wide):
    from normkit.methods.kernels.triton_kernel import sums

    x = inputs(layout, dtype, last=last)
    tolerance = {"rtol": 1e-12, "atol": 0.0} if wide == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    for ours, expected in zip(sums(x, rows_of(x, 1), wide), sum_and_square_sum(x.double(), 1), strict=True):
        assert ours.dtype == wide
        torch.testing.assert_close(ours.double(), expected, **tolerance)


@needs_triton
@cases
def test_bnp_weighted_sums_equal_the_readable_ones(layout, dtype, last):
    from normkit.methods.kernels.triton_kernel import sums

    x = inputs(layout, dtype, last=last)
    weights = torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ours = sums(x, rows_of(x, 1), torch.float64, weights)
    for found, expected in zip(ours, weighted_sums(x.double(), weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@needs_triton
def test_padding_of_a_tile_adds_nothing_even_where_features_are_constant():
    from normkit.methods.batchless.triton_kernel import affine_with_moments

    x = torch.full((3, 5), 7.0, device=DEVICE)
    zero, one = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    _, moments = affine_with_moments(x, rows_of(x, 1), zero, one, one, zero, 0.0)
    assert moments.count.item() == 3
    assert moments.mean.tolist() == [7.0] * 5
    assert moments.m2.abs().max().item() == 0


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(0, 3), "empty"),
        (torch.zeros(4, 3, dtype=torch.float64), "double precision"),
        (torch.zeros(4, 6)[:, ::2], "strided"),
        (torch.zeros(2, 3, 4, 5).transpose(2, 3), "transposed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_kernel_cannot_read_is_left_to_the_readable_code(x, reason):
    assert rows_of(x, 1) is None, reason


@needs_triton
def test_kernels_are_chosen_by_device_and_switched_off_by_one_variable(monkeypatch):
    monkeypatch.setattr(choice, "chosen", "")
    x = torch.zeros(2, 2, device=DEVICE)
    assert kernels(x) == ("triton" if x.is_cuda else "c")
    assert kernels(torch.zeros(2, 2)) == "c"
    assert kernels(torch.zeros(2, 2), torch.zeros(2, 2, device="meta")) is None
    monkeypatch.setattr(choice, "chosen", "triton")
    assert kernels(torch.zeros(2, 2)) == "triton"
    assert not torch.func.vmap(lambda row: row * (kernels(row) is not None))(torch.ones(2, 2)).any()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernels(x) is None
    monkeypatch.setattr(choice, "chosen", "0")
    assert kernels(x) is None


@pytest.mark.parametrize(("value", "fine"), [("0", True), ("triton", True), ("off", False)])
def test_a_value_that_the_switch_does_not_have_is_named(monkeypatch, value, fine):
    monkeypatch.setenv(choice.SWITCH, value)
    with nullcontext() if fine else pytest.raises(ValueError, match="NORMKIT_KERNELS=off: set it to 0"):
        assert choice._switch() == value


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 90], ids=["Ampere", "Hopper"])
def test_all_kernels_compile_to_machine_code_without_a_gpu(capability):
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program), str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["kernel"] for entry in found} == {"_forward", "_backward", "_sums", "_advance"}
    assert all(entry["bytes"] > 0 for entry in found)
    for entry in (entry for entry in found if entry["kernel"] != "_advance"):
        assert entry["wide_loads"], entry  # 16 bytes a thread, or memory does not run at its speed
        assert not entry["spills"], entry


def trained(recipe, monkeypatch, switch, dtype=torch.float32):
    """Parameters, and double gradients of the loss, after three steps with the kernels on or off."""
    monkeypatch.setattr(choice, "chosen", switch)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten()
    )
    model = model.to(DEVICE, dtype)
    inputs = torch.randn(3, 5, 2, 6, 6).to(DEVICE, dtype)
    model, optimizer = normkit.apply(recipe, model, lr=0.05, batches=[inputs[0]])
    for x in inputs:
        optimizer.zero_grad()
        for part in x.split(3):  # accumulated
            model(part).square().mean().backward()
        optimizer.step()
    loss = model(inputs[0]).square().mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)
    return [*model.state_dict().values(), *gradients, *second]


@needs_triton
@pytest.mark.parametrize("recipe", ["batchless", "batchless-projected", "bnp"])
def test_a_model_trains_alike_with_and_without_kernels(recipe, monkeypatch):
    *ours, readable = (trained(recipe, monkeypatch, switch) for switch in ("", "triton", "0"))
    for found in ours:
        torch.testing.assert_close(found, readable, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("norm", "shape"), [(BatchlessNorm2d, (2, 3, 4, 4)), (BatchlessNorm1d, (2, 3, 5))])
def test_the_batchless_layer_passes_the_same_gradients_with_and_without_kernels(norm, shape, affine, monkeypatch):
    found = []
    for switch in ("", "triton", "0"):
        monkeypatch.setattr(choice, "chosen", switch)
        layer = norm(3, affine=affine).to(DEVICE)
        layer.set_statistics(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]))
        x = torch.arange(float(torch.Size(shape).numel()), device=DEVICE).sin().view(shape).requires_grad_()
        y = layer(x)
        assert type(y.grad_fn).__name__.startswith("OnePass") == (switch == "triton" or (x.is_cuda and switch == ""))
        y.cos().sum().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    *ours, readable = found
    for some in ours:
        torch.testing.assert_close(some, readable, rtol=1e-5, atol=1e-6)
