"""What is measured on a model while it trains, one file per instrument.

Every instrument leaves weights, buffers, gradients, random states and train/eval flags as it found them, bit for bit,
also when the objective raises (see :mod:`evenkeel.guard`).
"""

from evenkeel.instruments._activations import Activations, activations
from evenkeel.instruments._angular import Angular, angular
from evenkeel.instruments._channels import Channels, channels
from evenkeel.instruments._conditioning import Conditioning, conditioning
from evenkeel.instruments._covariate_shift import CovariateShift, covariate_shift, snapshot
from evenkeel.instruments._curvature import Curvature, curvature
from evenkeel.instruments._discrepancy import Discrepancy, discrepancy
from evenkeel.instruments._doctor import Diagnosis, doctor
from evenkeel.instruments._gradient_removed import GradientRemoved, gradient_removed
from evenkeel.instruments._landscape import Landscape, landscape
from evenkeel.instruments.monitor import Monitor

__all__ = [
    "Activations",
    "Angular",
    "Channels",
    "Conditioning",
    "CovariateShift",
    "Curvature",
    "Diagnosis",
    "Discrepancy",
    "GradientRemoved",
    "Landscape",
    "Monitor",
    "activations",
    "angular",
    "channels",
    "conditioning",
    "covariate_shift",
    "curvature",
    "discrepancy",
    "doctor",
    "gradient_removed",
    "landscape",
    "snapshot",
]
