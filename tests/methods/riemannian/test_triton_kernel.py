"""The fused step of SGD-G and Adam-G against the stacked steps; without a GPU in Triton's interpreter (see conftest.py)."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from normkit import SGDG, AdamG

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone")


def step_all(rule, fused, options, steps):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 5, 5), (6, 8, 3, 3), (3, 2000), (5, 8, 3, 3), (1, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    rest = nn.Parameter(torch.randn(4, 3, generator=generator).to(DEVICE))
    groups = [{"params": params, "manifold": True}, {"params": [rest], "weight_decay": 0.1}]
    optimizer = rule(groups, lr=0.2, fused=fused, **options)
    for _ in range(steps):
        for p in (*params, rest):
            g = 0.3 * torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel())
            g[0] *= 0
            p.grad = g.to(DEVICE)
        optimizer.step()
    return [*params, rest, *(value for p in params for value in optimizer.state[p].values())]


@needs_triton
@pytest.mark.parametrize("options", [{}, {"orthogonality": 0.0, "max_norm": math.inf}], ids=str)
@pytest.mark.parametrize("rule", [SGDG, AdamG])
def test_the_kernel_equals_the_stacked_steps(rule, options):
    for ours, expected in zip(*(step_all(rule, fused, options, 6) for fused in (True, False)), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=2e-5)


def test_asking_for_the_kernel_where_it_cannot_work_is_refused():
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = SGDG([{"params": [p], "manifold": True}], fused=True, lr=torch.tensor(0.1))
    p.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="fused=True needs a kernel"):
        optimizer.step()


def test_the_kernel_is_left_alone_where_it_cannot_work():
    for ours, expected in zip(*(step_all(SGDG, fused, {}, 2) for fused in (None, False)), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=2e-5)
