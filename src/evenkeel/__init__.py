"""evenkeel keeps neural-network training on an even keel."""

from typing import TYPE_CHECKING, Any

from evenkeel import functional, moments
from evenkeel._recipes import apply, recipes
from evenkeel.description import describe
from evenkeel.folding import fold
from evenkeel.groups import param_groups
from evenkeel.invariance import scale_invariance
from evenkeel.methods.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from evenkeel.methods.batchless import BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from evenkeel.methods.batchless_start import initialize
from evenkeel.methods.batchless_training import attach
from evenkeel.methods.bnp import BNP
from evenkeel.methods.input_norm import InputNorm
from evenkeel.methods.langevin import LangevinBNP
from evenkeel.methods.lp_norm import LpNorm1d, LpNorm2d, LpNorm3d
from evenkeel.methods.noisy_norm import NoisyBatchNorm1d, NoisyBatchNorm2d, NoisyBatchNorm3d
from evenkeel.methods.revisited import revisit
from evenkeel.methods.riemannian import SGDG, AdamG
from evenkeel.recalibration import recalibrate
from evenkeel.surgery import convert, revert

if TYPE_CHECKING:
    from evenkeel import instruments
    from evenkeel.instruments import doctor

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    """Import the instruments where they are first used, so that training alone does not wait for them.

    Raises:
        AttributeError: There is no such name.
    """
    if name in ("instruments", "doctor"):
        import evenkeel.instruments as loaded

        return loaded if name == "instruments" else loaded.doctor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
