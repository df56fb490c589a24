import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.methods.riemannian.sphere import exponential_map, logarithmic_map, norm, parallel_transport, project

LENGTHS = st.integers(2, 4608)
SEEDS = st.integers(0, 2**31)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # geoopt scripts functions when it is imported
    import geoopt

STEPS = st.one_of(st.just(0.0), st.floats(1e-300, 1e-30), st.floats(1e-12, math.pi - 1e-3))


def draw(n, seed, t, rows=4):
    """Points, unit tangents times t, and any tangents, in float64."""
    generator = torch.Generator().manual_seed(seed)
    y, h, w = torch.randn(3, rows, n, generator=generator, dtype=torch.float64)
    y = y / norm(y)
    h = h - (y * h).sum(1, keepdim=True) * y
    w = w - (y * w).sum(1, keepdim=True) * y
    return y, t * h / norm(h), w


def written_exponential_map(y, h):
    """The formula as published, with its division."""
    t = h.norm(dim=1, keepdim=True)
    return torch.where(t > 0, y * t.cos() + h / t * t.sin(), y)


def written_transport(y, h, w):
    t = h.norm(dim=1, keepdim=True)
    u = torch.where(t > 0, h / t, 0.0)
    return w - (u * w).sum(1, keepdim=True) * ((1 - t.cos()) * u + t.sin() * y)


@given(LENGTHS, SEEDS, STEPS)
def test_steps_stay_on_the_sphere_and_transport_keeps_tangency_and_inner_products(n, seed, t):
    y, h, w = draw(n, seed, t)
    z, carried, carried_h = exponential_map(y, h), parallel_transport(y, h, w), parallel_transport(y, h, h)
    assert (norm(z) - 1).abs().max() < 1e-13
    assert (z * carried).sum(1).abs().max() < 1e-12 * w.norm(dim=1).max()
    assert torch.allclose((carried * carried_h).sum(1), (w * h).sum(1), rtol=1e-11, atol=1e-11)
    assert torch.allclose(norm(carried), norm(w), rtol=1e-12)


@given(LENGTHS, SEEDS, STEPS)
def test_maps_equal_the_formulas_as_the_paper_writes_them(n, seed, t):
    y, h, w = draw(n, seed, t)
    assert torch.allclose(exponential_map(y, h), written_exponential_map(y, h), rtol=0, atol=1e-13)
    assert torch.allclose(parallel_transport(y, h, w), written_transport(y, h, w), rtol=0, atol=1e-11)
    t_ = h.norm(dim=1, keepdim=True)
    assert torch.allclose(parallel_transport(y, h, h), h * t_.cos() - y * t_ * t_.sin(), rtol=0, atol=1e-12)


@given(LENGTHS, SEEDS, st.floats(1e-6, math.pi - 1e-3))
def test_logarithm_undoes_the_exponential_map(n, seed, t):
    y, h, _ = draw(n, seed, t)
    assert torch.allclose(logarithmic_map(y, exponential_map(y, h)), h, rtol=1e-6, atol=1e-12)


@given(st.integers(2, 512), SEEDS, st.floats(0.01, 3.0))  # its logarithm clamps a cosine, so not for short steps
def test_maps_agree_with_an_independent_implementation(n, seed, t):
    y, h, w = draw(n, seed, t)
    sphere = geoopt.SphereExact()
    assert torch.allclose(exponential_map(y, h), sphere.expmap(y, h), rtol=0, atol=1e-10)
    assert torch.allclose(project(y, w + y), sphere.proju(y, w + y), rtol=0, atol=1e-12)
    z = exponential_map(y, h)
    assert torch.allclose(logarithmic_map(y, z), sphere.logmap(y, z), rtol=1e-6, atol=1e-9)
    assert torch.allclose(norm(logarithmic_map(y, z)).squeeze(1), sphere.dist(y, z), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [0.0, 1e-38, 1e-7])
def test_zero_and_tiny_steps_are_the_identity_in_every_dtype(dtype, tiny):
    y, h, w = (x.to(dtype) for x in draw(64, 0, tiny))
    z = exponential_map(y, h)
    assert z.dtype == dtype
    assert torch.allclose(z, y, atol=2 * tiny)
    assert torch.allclose(parallel_transport(y, h, w), w, atol=max(8 * tiny, torch.finfo(dtype).eps ** 2))
    assert torch.allclose(logarithmic_map(y, y), torch.zeros_like(y), atol=10 * torch.finfo(dtype).eps ** 0.5)


@given(LENGTHS, SEEDS, st.floats(0, math.pi), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_rows_are_computed_in_float32(n, seed, t, dtype):
    y, h, w = (x.to(dtype) for x in draw(n, seed, t))
    for function, args in ((exponential_map, (y, h)), (parallel_transport, (y, h, w)), (project, (y, w))):
        result = function(*args)
        assert result.dtype == dtype
        assert torch.equal(result, function(*(x.float() for x in args)).to(dtype))
        assert result.isfinite().all()


def test_opposite_points_have_a_finite_logarithm():
    y = torch.tensor([[1.0, 0.0, 0.0]])
    assert logarithmic_map(y, -y).isfinite().all()


@pytest.mark.parametrize("function", [exponential_map, project])
def test_maps_are_differentiable_at_a_zero_step(function):
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    h = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(y, h)[0, 1], h)
    assert gradient.tolist() == [[0.0, 1.0]]
