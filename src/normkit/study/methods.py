"""A method of a study: the name of a recipe, and settings of it, as in ``revisited:scale=0.2:scale_lr_divisor=10``."""

import json
from typing import Any

from normkit._apply import recipes
from normkit._errors import nearest
from normkit.study.errors import StudyError


def parse_method(method: str) -> tuple[str, dict[str, Any]]:
    """Return the recipe's name, and its options as ``normkit.apply`` takes them.

    Examples:
        >>> parse_method("revisited:scale=0.2"), parse_method("batchless-adam:scale=inv"), parse_method("batch")
        (('revisited', {'scale': 0.2}), ('batchless-adam', {'scale': 'inv'}), ('batch', {}))
    """
    name, *settings = method.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        try:
            options[option] = json.loads(value)
        except ValueError:
            options[option] = value
    return name, options


def check_method(method: str) -> None:
    """Check that there is such a recipe with such options.

    Raises:
        StudyError: There is none.
    """
    name, options = parse_method(method)
    if name not in recipes():
        raise StudyError(f"--methods: unknown method {name!r}; {nearest(name, recipes())}")
    known = recipes()[name].options
    for option in options:
        if option not in known:
            remedy = nearest(option, known) if known else f"{name!r} has no options"
            raise StudyError(f"--methods {method}: unknown option {option!r}; {remedy} (as in {name}:OPTION=VALUE)")
