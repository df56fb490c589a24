"""Triton kernels that several methods use, and what decides where kernels run."""
