"""Batch Normalization Preconditioning (Lange, Helfrich, Ye 2022, arXiv 2108.01110) and Langevin sampling with its metric."""

from normkit.methods.bnp.bnp import BNP, METHOD
from normkit.methods.bnp.langevin import LangevinBNP

__all__ = ["BNP", "METHOD", "LangevinBNP"]
