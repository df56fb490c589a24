"""Read and run a model without changing it."""
