"""The experiments of "How does batch normalization help optimization?" on any model."""
