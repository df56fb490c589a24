"""Replace, restore, fold and recalibrate the normalization layers of any model."""

from normkit.surgery._convert import convert, revert
from normkit.surgery._describe import describe
from normkit.surgery._fold import fold
from normkit.surgery._recalibrate import recalibrate

__all__ = ["convert", "describe", "fold", "recalibrate", "revert"]
