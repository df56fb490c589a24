"""evenkeel keeps neural-network training on an even keel."""

from evenkeel import functional, moments

__version__ = "0.1.0"

__all__ = [
    "functional",
    "moments",
]
