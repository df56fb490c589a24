"""The C kernels for CPUs against the readable code, and what happens where they cannot be compiled."""

import copy
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from normkit import SGDG, AdamG, BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from normkit.methods.batchless import one_pass
from normkit.methods.kernels import c_kernel, choice, compiled
from normkit.methods.kernels.layout import lie_alike
from normkit.moments import observe, sum_and_square_sum, weighted_sums

pytestmark = [
    pytest.mark.skipif(not compiled._compiler(), reason="there is no C compiler on this machine"),
    pytest.mark.filterwarnings("ignore:sgd-g does little here", "ignore:adam-g does little here"),
]

SHAPES = {
    "matrix": (70, 5),
    "one row": (1, 40),
    "sequence": (3, 11, 70),
    "images": (3, 7, 9, 5),
    "one position": (4, 20, 1, 1),
    "many rows": (2, 35, 60, 40),
    "volumes": (2, 3, 4, 5, 3),
    "large volumes": (2, 17, 14, 15, 13),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
layouts = pytest.mark.parametrize(
    ("name", "last"), [(name, last) for name, shape in SHAPES.items() for last in (False, True)[: 1 + (len(shape) > 3)]]
)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(name, last, dtype=torch.float64, seed=0):
    x = 3 + 2 * torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.to(memory_format=LAST[x.dim()]) if last else x


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_double_precision(name, last, dtype, weighted, threads):
    x = drawn(name, last, dtype)
    weights = torch.rand(x.shape[2:], dtype=torch.float64) if weighted else None
    found = c_kernel.Sums(x.shape, dtype, 1, weights)(x)
    assert found.dtype == torch.float64
    wide = x.double()
    expected = weighted_sums(wide, weights) if weighted else sum_and_square_sum(wide, 1)
    torch.testing.assert_close(found, torch.stack(expected, 1), **EXACT)


def test_sums_of_tokens_and_of_one_image_are_taken_along_the_right_dimension():
    tokens, image = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    for x, dim in ((tokens, -1), (image, -3), (image, 0)):
        found = c_kernel.Sums(x.shape, x.dtype, dim)(x)
        torch.testing.assert_close(found, torch.stack(sum_and_square_sum(x, dim), 1), **EXACT)


@layouts
@pytest.mark.parametrize("far", [0.0, 1e6])
def test_moments_keep_their_digits_far_from_zero(name, last, far, threads):
    x = far + drawn(name, last)
    expected = observe(x, 1)
    mean, m2 = c_kernel.moments(x, expected.mean + 0.1)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(m2, expected.m2, rtol=1e-9, atol=1e-9)


@layouts
def test_sums_of_an_input_and_moments_of_an_output_are_those_of_each(name, last, threads):
    x, y = drawn(name, last), drawn(name, last, seed=2)
    pivot = observe(y, 1).mean + 0.1
    sums, *moments = c_kernel.SumsAndMoments((x.shape, y.shape), x.dtype, (1, 1))(x, y, pivot)
    assert torch.equal(sums, c_kernel.Sums(x.shape, x.dtype, 1)(x))
    for got, want in zip(moments, c_kernel.moments(y, pivot), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, 6)[:, ::2], torch.zeros(2, 3, 4, 5).transpose(2, 3), torch.zeros(3, 2, dtype=torch.bfloat16)],
    ids=["strided", "transposed", "half precision"],
)
def test_what_the_kernels_cannot_read_is_left_to_the_readable_code(x):
    assert c_kernel.Sums(x.shape, x.dtype, 1)(x) is None
    assert c_kernel.moments(x, torch.zeros(x.shape[1], dtype=x.dtype)) is None


def test_weights_and_gradients_of_different_layouts_are_left_to_the_readable_code():
    a = torch.zeros(4, 3, 3, 3)
    assert lie_alike(a, a.clone())
    assert lie_alike(*(x.to(memory_format=torch.channels_last) for x in (a, a.clone())))
    assert not lie_alike(a, a.to(memory_format=torch.channels_last))
    assert not lie_alike(a[:, ::2], a[:, ::2])


@layouts
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_a_batchless_layer_computes_in_one_pass_what_it_computes_in_many(
    monkeypatch, name, last, affine, needs_dx, threads
):
    norms = {2: BatchlessNorm1d, 3: BatchlessNorm1d, 4: BatchlessNorm2d, 5: BatchlessNorm3d}
    monkeypatch.setattr(one_pass, "few", 0)
    found = []
    for switch in ("", "0"):
        monkeypatch.setattr(choice, "chosen", switch)
        x = drawn(name, last).requires_grad_(needs_dx)
        norm = norms[x.dim()](x.shape[1], affine=affine).double()
        generator = torch.Generator().manual_seed(1)
        norm.set_statistics(*torch.rand(2, x.shape[1], generator=generator, dtype=torch.float64) + 1)
        head = nn.Parameter(torch.ones((), dtype=torch.float64))
        if affine:
            norm.weight.data.copy_(torch.rand(x.shape[1], generator=generator))
        normkit.attach(norm, torch.optim.SGD([*norm.parameters(), head], lr=0.0))
        y = norm(x) * head
        assert lie_alike(y, x)
        (y * drawn(name, last, seed=2)).sum().backward()
        rows, instances = norm.take()
        assert instances == len(x)
        parameters = [p for p in norm.parameters() if p.requires_grad]
        found.append([y.detach(), *rows, *(t.grad for t in (x, *parameters) if t.requires_grad)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


class Everything(nn.Module):
    """Every kind of layer whose gradients the methods change."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.pointwise = nn.Conv2d(12, 16, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.hidden = nn.Linear(6, 20, bias=False)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm2(self.grouped(x)))
        x = F.relu(self.norm3(self.pointwise(self.depthwise(x))))
        return self.head(self.hidden(self.up(x).relu().mean((2, 3))).relu())


RECIPES = ("bnp", "bnp-paper", "bnp-adam", "group+bnp", "batchless", "batchless-projected", "sgd-g", "adam-g")


def trained(recipe, monkeypatch, switch, last):
    monkeypatch.setattr(choice, "chosen", switch)
    torch.manual_seed(0)
    model = Everything().double()
    inputs = torch.randn(4, 6, 3, 8, 8, dtype=torch.float64)
    if last:
        model = model.to(memory_format=torch.channels_last)
        inputs = torch.stack([x.contiguous(memory_format=torch.channels_last) for x in inputs])
    labels = torch.randint(5, (6,))
    model, optimizer = normkit.apply(recipe, model, lr=0.1, batches=[inputs[0]])
    for x in inputs:
        optimizer.zero_grad()
        for part in (slice(2), slice(2, 6)):  # accumulated
            images = x[part].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            F.cross_entropy(model(images), labels[part]).backward()
        optimizer.step()
    return [t for t in model.state_dict().values() if t.is_floating_point()]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_takes_the_same_steps_with_and_without_kernels(recipe, last, monkeypatch, threads):
    monkeypatch.setattr(one_pass, "few", 100)
    ours, readable = (trained(recipe, monkeypatch, switch, last) for switch in ("", "0"))
    for found, expected in zip(ours, readable, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"orthogonality": 0.0, "max_norm": math.inf}, {"max_norm": 0.01}], ids=str)
@pytest.mark.parametrize("rule", [SGDG, AdamG])
def test_the_step_on_the_sphere_equals_the_stacked_and_the_readable_one(rule, options, dtype, threads):
    shapes = [(8, 3, 5, 5), (6, 8, 3, 3), (3, 20000), (5, 8, 3, 3), (1, 2)]
    found = []
    for choices in ({}, {"fused": False}, {"fused": False, "foreach": False}):
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
        weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
        optimizer = rule([{"params": weights, "manifold": True}], lr=0.2, **options, **choices)
        for _ in range(5):
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype) / math.sqrt(p[0].numel())
                p.grad[0] *= 0
            optimizer.step()
        found.append([*weights, *(value for p in weights for value in optimizer.state[p].values())])
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    for ours, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(ours, other, **tolerance)


def test_a_weight_that_a_kernel_changed_counts_as_changed():
    layer = nn.Linear(3, 2, bias=False)
    optimizer = SGDG([{"params": [layer.weight], "manifold": True}], lr=0.1)
    loss = (layer(torch.ones(4, 3)) @ layer.weight).sum()
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("recipe", ["bnp", "batchless-projected", "sgd-g"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_goes_on_with_kernels_of_its_own(recipe, how):
    torch.manual_seed(0)
    x, labels = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    model, optimizer = normkit.apply(recipe, Everything(), lr=0.1, batches=[x])

    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    step(model, optimizer)
    copied = how((model, optimizer))
    for pair in ((model, optimizer), copied):
        step(*pair)
    for ours, theirs in zip(model.state_dict().values(), copied[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has compiled nothing, with a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    compiled._compiler.cache_clear()
    yield tmp_path
    compiled._compiler.cache_clear()


def source():
    return compiled.Source(c_kernel._SOURCE.path, **c_kernel._SOURCE.signatures)


def kept_kernels(folder):
    return list((folder / "normkit" / "kernels").iterdir())


def test_a_compiled_kernel_is_kept_and_found_again(fresh, monkeypatch):
    assert source().compiled(torch.float32) is not None
    assert len(kept_kernels(fresh / "cache")) == 1
    monkeypatch.setattr(compiled.subprocess, "run", None)  # nothing may be compiled now
    assert source().compiled(torch.float32) is not None


def test_a_kept_file_that_is_no_library_is_compiled_anew(fresh, monkeypatch):
    assert source().compiled(torch.float32) is not None
    (kept,) = kept_kernels(fresh / "cache")
    other = fresh / "other" / "normkit" / "kernels" / kept.name
    other.parent.mkdir(parents=True)
    other.write_text("no library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "other"))
    assert source().compiled(torch.float32) is not None
    assert other.stat().st_size == kept.stat().st_size


def test_without_a_compiler_the_readable_code_runs(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh))
    with caplog.at_level(logging.INFO, logger="normkit"):
        assert source().compiled(torch.float32) is None
    assert "there is no C compiler" in caplog.text


def test_a_compiler_that_fails_is_named_with_what_it_said(fresh, monkeypatch, caplog):
    broken = fresh / "brokencc"
    broken.write_text("#!/bin/sh\necho 'no disk left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert source().compiled(torch.float32) is None
    assert "c_kernel.c could not be compiled" in caplog.text
    assert "no disk left" in caplog.text
    assert "NORMKIT_KERNELS=0" in caplog.text


def test_a_compiler_without_threads_is_enough(fresh, monkeypatch):
    plain = fresh / "plaincc"
    plain.write_text('#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec cc "$@"\n')
    plain.chmod(0o755)
    monkeypatch.setenv("CC", str(plain))
    library = source().compiled(torch.float64)
    assert library is not None


def test_a_folder_that_cannot_be_written_is_no_fault(fresh, monkeypatch):
    (fresh / "cache").write_text("a file where the folder should be")
    assert source().compiled(torch.float32) is not None


def test_half_precision_has_no_kernel():
    assert c_kernel._SOURCE.compiled(torch.bfloat16) is None


@pytest.mark.parametrize("what", ["input of another type", "strided scale"])
def test_a_layer_that_the_kernels_cannot_read_trains_as_without_them(monkeypatch, what):
    monkeypatch.setattr(one_pass, "few", 0)
    found = []
    for switch in ("", "0"):
        monkeypatch.setattr(choice, "chosen", switch)
        torch.manual_seed(0)
        x = torch.randn(6, 4, 3, 3, dtype=torch.float64 if what == "input of another type" else torch.float32)
        norm = BatchlessNorm2d(4)
        if what == "strided scale":
            norm.weight = nn.Parameter(torch.arange(8.0)[::2])
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
        normkit.attach(norm, optimizer)
        norm(x).square().mean().backward()
        optimizer.step()
        found.append([p.detach() for p in norm.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_biases_that_were_assigned_are_transformed_whatever_their_layout(monkeypatch):
    found = []
    for switch in ("", "0"):
        monkeypatch.setattr(choice, "chosen", switch)
        torch.manual_seed(0)
        model, optimizer = normkit.apply("bnp", nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), lr=0.1)
        for expanded in (False, True):
            model(torch.randn(5, 3)).square().sum().backward()
            if expanded:
                model[0].bias.grad = torch.arange(8.0)[::2]
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in model.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
