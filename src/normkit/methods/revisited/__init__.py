"""Revisiting Batch Normalization (Davis, Frank 2022, arXiv 2110.13989): initial scale, its learning rate, online inputs."""

from normkit.methods.revisited.input_norm import InputNorm
from normkit.methods.revisited.revisit import METHOD, revisit

__all__ = ["METHOD", "InputNorm", "revisit"]
