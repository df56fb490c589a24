"""The public names of the package, and where they come from."""

from typing import TYPE_CHECKING

from normkit import functional, moments
from normkit._apply import apply, handle, recipes
from normkit.methods.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from normkit.methods.batchless.training import attach, initialize
from normkit.methods.bnp.bnp import BNP
from normkit.methods.bnp.langevin import LangevinBNP
from normkit.methods.filter_response import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from normkit.methods.lp_norm import LpNorm1d, LpNorm2d, LpNorm3d
from normkit.methods.noisy_norm import NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d
from normkit.methods.revisited.input_norm import InputNorm
from normkit.methods.revisited.revisit import revisit
from normkit.methods.riemannian.optimizers import SGDG, AdamG
from normkit.optim.invariance import scale_invariance
from normkit.optim.param_groups import param_groups
from normkit.surgery._convert import convert, revert
from normkit.surgery._describe import describe
from normkit.surgery._fold import fold
from normkit.surgery._recalibrate import recalibrate

if TYPE_CHECKING:
    from normkit import instruments
    from normkit.instruments import doctor

__all__ = [
    "BNP",
    "SGDG",
    "AdamG",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchlessNorm1d",
    "BatchlessNorm2d",
    "BatchlessNorm3d",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "InputNorm",
    "LangevinBNP",
    "LpNorm1d",
    "LpNorm2d",
    "LpNorm3d",
    "NoisyBatchNorm1d",
    "NoisyBatchNorm2d",
    "NoisyBatchNorm3d",
    "apply",
    "attach",
    "convert",
    "describe",
    "doctor",
    "fold",
    "functional",
    "handle",
    "initialize",
    "instruments",
    "moments",
    "param_groups",
    "recalibrate",
    "recipes",
    "revert",
    "revisit",
    "scale_invariance",
]
