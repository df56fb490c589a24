"""Batchless Normalization (Berger, Uc Cetina 2022, arXiv 2212.14729): mean and deviation learned by likelihood."""

from normkit.methods.batchless.layer import BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d
from normkit.methods.batchless.training import METHOD, attach, initialize

__all__ = ["METHOD", "BatchlessNorm1d", "BatchlessNorm2d", "BatchlessNorm3d", "attach", "initialize"]
