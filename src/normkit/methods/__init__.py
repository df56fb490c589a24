"""One file per published idea."""
