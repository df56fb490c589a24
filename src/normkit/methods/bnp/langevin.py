"""Langevin sampling preconditioned by BNP.

Lange, Deng, Ye, Lin, "Batch normalization preconditioning for stochastic gradient Langevin dynamics", J. Mach. Learn. 2(1),
2023.

For a potential ``U`` (minus the log of the posterior) and BNP's ``P``: ``theta <- theta - (eps/2) P P^T grad U + sqrt(eps) P xi``
with standard normal ``xi``. Drift and noise share the metric, so the posterior stays the invariant distribution (up to the
discretization), while directions that plain Langevin dynamics crosses slowly are crossed faster.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normkit.methods.bnp.bnp import BNP
from normkit.methods.bnp.preconditioning import out_of_z_
from normkit.optim.weight_rows import Layout


def preconditioned_noise(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *,
    divisor: Tensor | float = 1.0,
    groups: int = 1,
    transposed: bool = False,
    mean_removed: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw Gaussian noise with covariance ``P P^T / q^2``, the matrix that [`normkit.functional.precondition`][] applies.

    Per unit ``noise_w = xi_w / (sqrt(s) q)`` and ``noise_b = xi_b / q - noise_w . mu``. Without a bias the covariance is
    ``(diag(s) + mu mu^T)^-1 / q^2``, drawn as ``(xi - c v (v . xi)) / (sqrt(s) q)`` with ``v = mu / sqrt(s)`` and
    ``c = (1 - 1 / sqrt(1 + |v|^2)) / |v|^2``.

    Args:
        weight: The weight, for shape, dtype and device; laid out as for [`normkit.functional.precondition`][].
        bias: The bias, or None.
        mean: Mean of the layer's input, ``(in,)``.
        variance: Guarded variance of it, ``(in,)``.
        divisor: ``q^2``.
        groups: Groups of the convolution.
        transposed: Whether the weight is laid out as that of a transposed convolution.
        mean_removed: Whether what follows a layer without bias removes the mean of each unit.
        generator: Source of the random numbers.

    Returns:
        Noise shaped as weight and bias.
    """
    layout = Layout(weight.shape, groups, transposed)
    xi = layout.rows(torch.randn(weight.shape, dtype=mean.dtype, device=weight.device, generator=generator))
    mu, scale, q = layout.along_in(mean), layout.along_in(variance.rsqrt()), torch.as_tensor(divisor).sqrt()
    if bias is not None:
        xi_bias = layout.units(torch.randn(bias.shape, dtype=mean.dtype, device=bias.device, generator=generator))
        noise, bias_noise = out_of_z_(xi, xi_bias, mu, scale)
        return layout.weight(noise) / q, bias_noise.reshape(-1) / q
    return layout.weight((xi if mean_removed else _root_(xi, mu * scale)).mul_(scale)) / q, None


def _root_(z: Tensor, v: Tensor) -> Tensor:
    """``z (I + v v^T)^(-1/2)``: along ``v`` divided by ``r = sqrt(1 + |v|^2)``, that is ``z - (z . v) v / (r (r + 1))``."""
    root = (1 + v.square().sum(-1, keepdim=True)).sqrt()
    return z.addcmul_(z @ v.mT, v / (root * (root + 1)), value=-1)


class LangevinBNP(Optimizer):
    """Samples from ``exp(-U)``, where ``U`` is the loss, with BNP's metric in drift and noise.

    ``theta <- theta - (eps/2) P P^T grad U + sqrt(eps) P xi``; Lange, Deng, Ye, Lin, J. Mach. Learn. 2(1), 2023.
    Parameters of layers that BNP leaves alone follow plain Langevin dynamics. The metric of hidden layers follows running
    statistics, since their inputs move with the samples; exact sampling needs statistics that have settled.

    Args:
        bnp: The BNP of the model, with ``max_change`` None: a bounded drift would not match its noise.
        params: The model's parameters.
        lr: Step size ``eps``.
        generator: Source of the random numbers.

    Raises:
        ValueError: ``lr`` is not positive, or the BNP bounds its steps.
    """

    def __init__(self, bnp: BNP, params: Any, lr: float, *, generator: torch.Generator | None = None) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if bnp.max_change is not None:
            raise ValueError(
                f"max_change={bnp.max_change} bounds the drift and not the noise; use BNP(model) without it"
            )
        super().__init__(params, {"lr": lr})
        self._bnp, self._generator = bnp, generator
        bnp.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bnp": self._bnp, "_generator": self._generator}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Drift along the preconditioned gradient, and diffuse.

        Args:
            closure: Computes the loss anew, optional.

        Returns:
            What the closure returned.
        """
        loss = None if closure is None else closure()
        with torch.no_grad():
            noise = {}
            for observed, preconditioner in self._bnp.metrics():
                weight, bias = observed.layer.weight, observed.layer.bias
                moving = bias if bias is not None and bias.requires_grad else None
                drawn = preconditioned_noise(
                    weight,
                    moving,
                    preconditioner.mean,
                    preconditioner.variance,
                    divisor=preconditioner.divisor,
                    groups=observed.geometry.groups,
                    transposed=observed.geometry.transposed,
                    mean_removed=observed.mean_removed,
                    generator=self._generator,
                )
                noise.update({id(p): n for p, n in zip((weight, moving), drawn, strict=True) if p is not None})
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        xi = noise.get(id(p))
                        if xi is None:
                            xi = torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=self._generator)
                        p.add_(p.grad, alpha=-group["lr"] / 2).add_(xi.to(p.dtype), alpha=group["lr"] ** 0.5)
        return loss
