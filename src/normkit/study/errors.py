"""The one error a user of the study meets: it names the argument, its value and the remedy."""

import difflib
from collections.abc import Iterable


class StudyError(ValueError):
    """Bad input to a study. The command line prints it as one line and exits with code 2."""


def nearest(value: str, choices: Iterable[str]) -> str:
    """A half-sentence for error messages: the nearest choice if there is one, and all choices.

    Examples:
        >>> nearest("bach", ["batch", "group"])
        "did you mean 'batch'? (choose from batch, group)"
        >>> nearest("?", ["batch", "group"])
        'choose from batch, group'
    """
    names = list(choices)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    listed = f"choose from {', '.join(names)}"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed
