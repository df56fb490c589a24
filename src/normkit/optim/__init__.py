"""What belongs around any optimizer: hooks on its step, parameter groups, scale invariance, unit filters."""
