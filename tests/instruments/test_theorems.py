"""The theorems of "How does batch normalization help optimization?", in their correct form, hold in the instruments."""

import pytest
import torch
from torch import nn

from normkit.instruments import curvature


class Activations(nn.Module):
    """The input of a normalization as trainable weights: the instruments look at the loss as a function of it."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_4_2_curvature_before_and_after_batch_normalization(seed):
    torch.manual_seed(seed)
    m, gamma = 7, 1.7
    x = torch.randn(m, dtype=torch.float64) * 2 + 1
    H = torch.randn(m, m, dtype=torch.float64)
    H, b = H + H.T, torch.randn(m, dtype=torch.float64)

    def loss(model, _):
        y = (model.x - model.x.mean()) / model.x.std(correction=0)
        z = gamma * y
        return z @ H @ z / 2 + b @ z

    model = Activations(x)
    found = curvature(model, loss, None)
    sigma, y = x.std(correction=0), (x - x.mean()) / x.std(correction=0)
    g = gamma * H @ y + b
    d = gamma / sigma * (g - g.mean() - y * (g @ y) / m)  # dL/dx by theorem 4.1's projections
    square = d.square().sum()
    assert found.gradient_norm**2 == pytest.approx(square.item(), rel=1e-10)
    theorem = (gamma / sigma) ** 2 * d @ H @ d - gamma / (m * sigma**2) * (g @ y) * square
    assert found.directional == pytest.approx((theorem / square).item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_lemma_4_5_a_scale_invariant_net_starts_nearer_to_an_optimum(seed):
    torch.manual_seed(seed)
    x = torch.randn(64, 6, dtype=torch.float64)
    plain = nn.Linear(6, 1, bias=False).double()
    target = x @ torch.randn(6, 1, dtype=torch.float64)
    start = plain.weight.detach().clone()
    optimum = torch.linalg.lstsq(x, target).solution.T
    if (optimum * start).sum() < 0:
        start = -start
    norm = nn.BatchNorm1d(1, eps=1e-30).double()
    with torch.no_grad():
        norm.weight.fill_(target.std(correction=0).item())
        norm.bias.fill_(target.mean().item())

    def loss(w):
        return (norm(x @ w.T) - target).square().mean().item()

    nearest = (optimum * start).sum() / optimum.square().sum() * optimum  # the nearest point of the ray of optima
    assert loss(nearest) < 1e-20
    assert loss(start) > 1e-3
    left = (start - nearest).square().sum().item()
    gain = ((optimum.square().sum() - (optimum * start).sum()) ** 2 / optimum.square().sum()).item()
    assert left == pytest.approx((start - optimum).square().sum().item() - gain, rel=1e-10)
