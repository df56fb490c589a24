"""Kernels that several methods use, in Triton for GPUs and in C for CPUs, and the choice where they run."""
