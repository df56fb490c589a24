"""Standardized convolution weights: with GroupNorm (arXiv 1903.10520), and without any normalization (2102.06171)."""
