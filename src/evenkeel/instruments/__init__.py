"""What is measured on a model while it trains, one file per instrument."""
