"""The pure functions of the methods, without state."""

from evenkeel.methods.batchless import gaussian_nll_gradients
from evenkeel.methods.batchless_projected import projected_gradient

__all__ = [
    "gaussian_nll_gradients",
    "projected_gradient",
]
