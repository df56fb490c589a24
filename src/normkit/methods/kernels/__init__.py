"""Triton kernels that several methods use, and the choice where kernels run."""
