"""What error messages share: the name a user probably meant."""

import difflib
from collections.abc import Iterable


def closest(value: str, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the choice most like ``value``, or None where none is.

    Args:
        value: What was given.
        choices: What could have been given.
        cutoff: Least similarity in [0, 1] of a choice that is returned.

    Examples:
        >>> closest("bach", ["batch", "group"]), closest("?", ["batch", "group"])
        ('batch', None)
    """
    return next(iter(difflib.get_close_matches(value, list(choices), n=1, cutoff=cutoff)), None)


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return a half-sentence for error messages: the closest choice if there is one, and all choices.

    Args:
        value: What was given.
        choices: What could have been given.

    Examples:
        >>> nearest("bach", ["batch", "group"])
        "did you mean 'batch'? (choose from batch, group)"
        >>> nearest("?", ["batch", "group"])
        'choose from batch, group'
    """
    names = list(choices)
    close = closest(value, names)
    listed = f"choose from {', '.join(names)}"
    return f"did you mean {close!r}? ({listed})" if close is not None else listed
