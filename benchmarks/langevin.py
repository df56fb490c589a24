"""How fast Langevin sampling reaches the whole posterior: plain steps against BNP's metric.

Least squares with one linear unit whose inputs are shifted and unequally scaled, so that the posterior is a narrow Gaussian in
closed form. 2,000 chains start at its mean. Reported is, over the steps, the smallest ratio of the chains' variance to the
posterior's along its principal directions: 0 at the start, 1 once every direction is sampled. Both step sizes are a tenth of the
largest stable one.

    python benchmarks/langevin.py
"""

import torch
from torch import Tensor, nn

import normkit
from common import save

CHAINS = 2000
RECORDED = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
STEP = 0.4
"""Step size times the largest curvature; 4 is the limit of stability."""


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and the Hessian of the squared loss in (bias, weight): the inverse of the posterior's covariance."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    x = torch.randn(50, 3, dtype=torch.float64, generator=generator) * scales + torch.tensor([1.0, -2.0, 3.0])
    rows = torch.cat([torch.ones(50, 1, dtype=torch.float64), x], 1)
    return x, x @ torch.tensor([[1.0], [-0.5], [0.2]], dtype=torch.float64), rows.T @ rows


def shares(preconditioned: bool) -> dict[int, float]:
    """Step -> the smallest share of the posterior's variance along its principal directions."""
    torch.manual_seed(0)
    x, target, hessian = problem()
    layer = nn.Linear(3, CHAINS).double()  # the chains side by side
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64).expand(CHAINS, 3))
        layer.bias.zero_()
    if preconditioned:
        metric = torch.eye(4, dtype=torch.float64)
        metric[0, 1:] = -x.mean(0)
        metric[:, 1:] /= x.std(0, correction=0)
        curvature = torch.linalg.eigvalsh(metric.T @ hessian @ metric)[-1].item()
        bnp = normkit.BNP(layer, eps_relative=0.0, eps=1e-12)
        sampler = normkit.LangevinBNP(bnp, layer.parameters(), lr=STEP / curvature)
    else:
        lr = STEP / torch.linalg.eigvalsh(hessian)[-1].item()
        sampler = torch.optim.SGD(layer.parameters(), lr=lr / 2)
    precisions, directions = torch.linalg.eigh(hessian)
    found = {}
    for step in range(1, RECORDED[-1] + 1):
        sampler.zero_grad()
        ((layer(x) - target).square().sum() / 2).backward()
        sampler.step()
        if not preconditioned:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=lr**0.5)
        if step in RECORDED:
            samples = torch.cat([layer.bias[:, None], layer.weight], 1).detach()
            variances = (samples @ directions).var(0)
            found[step] = round((variances * precisions).min().item(), 4)
    return found


def main() -> None:
    """Run both, print and store."""
    torch.set_num_threads(1)
    result = {"plain": shares(False), "preconditioned": shares(True)}
    for name, found in result.items():
        print(name, found)
    save("langevin", "python benchmarks/langevin.py", result)


if __name__ == "__main__":
    main()
