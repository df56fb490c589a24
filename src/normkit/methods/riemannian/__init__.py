"""Riemannian batch normalization (Cho, Lee 2017, arXiv 1709.09603): SGD-G and Adam-G on the unit sphere."""

from normkit.methods.riemannian.optimizers import METHOD, SGDG, AdamG

__all__ = ["METHOD", "SGDG", "AdamG"]
