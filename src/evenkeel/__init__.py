"""evenkeel keeps neural-network training on an even keel."""

from evenkeel import functional, moments
from evenkeel._recipes import apply, recipes
from evenkeel.groups import param_groups
from evenkeel.methods.lp_norm import LpNorm1d, LpNorm2d, LpNorm3d
from evenkeel.methods.noisy_norm import NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d
from evenkeel.surgery import convert, revert

__version__ = "0.1.0"

__all__ = [
    "LpNorm1d",
    "LpNorm2d",
    "LpNorm3d",
    "NoisyBatchNorm1d",
    "NoisyBatchNorm2d",
    "NoisyBatchNorm3d",
    "apply",
    "convert",
    "functional",
    "moments",
    "param_groups",
    "recipes",
    "revert",
]
