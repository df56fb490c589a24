"""Standardized convolution weights: with GroupNorm (arXiv 1903.10520), and without any normalization (2102.06171)."""

from normkit.methods.weight_standardization.normalizer_free import METHOD

__all__ = ["METHOD"]
