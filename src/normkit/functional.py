"""The methods as pure functions, without state.

- BNP (arXiv 2108.01110): ``precondition``, ``guarded_variance``, ``step_divisor``, ``update_running``; our bound on its steps,
  ``unit_changes`` and ``bounding_factors``; ``preconditioned_noise`` (Lange, Deng, Ye, Lin, J. Mach. Learn. 2(1), 2023).
- Batchless normalization (arXiv 2212.14729): ``gaussian_nll_gradients``; our ``projected_weight_gradient``.
- SGD-G and Adam-G (arXiv 1709.09603): ``sgdg``, ``adamg``, ``clip_rows``, ``orthogonality_gradient``; on the sphere ``project``,
  ``exponential_map``, ``logarithmic_map``, ``parallel_transport``.
- Batch Renormalization (arXiv 1702.03275): ``renorm_correction``.
"""

from normkit.methods.batch_renorm import renorm_correction
from normkit.methods.batchless.functions import gaussian_nll_gradients
from normkit.methods.batchless.projection import projected_weight_gradient
from normkit.methods.bnp.langevin import preconditioned_noise
from normkit.methods.bnp.preconditioning import (
    bounding_factors,
    guarded_variance,
    precondition,
    step_divisor,
    unit_changes,
    update_running,
)
from normkit.methods.riemannian.filters import clip_rows, orthogonality_gradient
from normkit.methods.riemannian.optimizers import adamg, sgdg
from normkit.methods.riemannian.sphere import exponential_map, logarithmic_map, parallel_transport, project

__all__ = [
    "adamg",
    "bounding_factors",
    "clip_rows",
    "exponential_map",
    "gaussian_nll_gradients",
    "guarded_variance",
    "logarithmic_map",
    "orthogonality_gradient",
    "parallel_transport",
    "precondition",
    "preconditioned_noise",
    "project",
    "projected_weight_gradient",
    "renorm_correction",
    "sgdg",
    "step_divisor",
    "unit_changes",
    "update_running",
]
