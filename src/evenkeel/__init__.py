"""evenkeel keeps neural-network training on an even keel."""

from evenkeel import functional, moments
from evenkeel._recipes import apply, recipes
from evenkeel.groups import param_groups

__version__ = "0.1.0"

__all__ = [
    "apply",
    "functional",
    "moments",
    "param_groups",
    "recipes",
]
