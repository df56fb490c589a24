"""The list of methods: one line per method, in the order in which they are shown."""

from importlib import import_module

from normkit.methods.method import Method, Recipe, Target

_FILES = (
    "baselines",
    "weight_standardization",
    "frozen",
    "online",
    "filter_response",
    "batch_renorm",
    "riemannian",
    "noisy_norm",
    "lp_norm",
    "bnp",
    "batchless",
    "revisited",
    "zero_gamma",
)  # of this folder; each declares a METHOD

METHODS: tuple[Method, ...] = tuple(import_module(f"normkit.methods.{name}").METHOD for name in _FILES)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for method in METHODS for recipe in method.recipes}
"""Name -> recipe, see ``normkit.recipes``."""

TARGETS: dict[str, Target] = {name: target for method in METHODS for name, target in method.targets.items()}
"""Name -> conversion target, in the order in which error messages list them."""
