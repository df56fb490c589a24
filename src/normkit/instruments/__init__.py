"""Measure a model while it trains; one file per instrument.

Every instrument leaves weights, buffers, gradients, random states and train/eval flags as it found them, bit for bit,
also when the objective raises (see ``normkit.inspection.probe``).
"""

from normkit.instruments._activations import Activations, activations
from normkit.instruments._angular import Angular, angular
from normkit.instruments._channels import Channels, channels
from normkit.instruments._conditioning import Conditioning, conditioning
from normkit.instruments._covariate_shift import CovariateShift, covariate_shift, snapshot
from normkit.instruments._curvature import Curvature, curvature
from normkit.instruments._discrepancy import Discrepancy, discrepancy
from normkit.instruments._doctor.doctor import Diagnosis, doctor
from normkit.instruments._gradient_removed import GradientRemoved, gradient_removed
from normkit.instruments._landscape import Landscape, landscape
from normkit.instruments.monitor import Monitor

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
