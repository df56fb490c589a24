"""Waiting for a storage that is away for a while: a database server that restarts must not end a study."""

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError

from normkit.study.errors import StudyError

PATIENCE_SECONDS = 300.0
RETRY_SECONDS = 1.0
_LASTING = ("database or disk is full", "disk I/O error", "readonly database", "unable to open")  # SQLite's words

_P = ParamSpec("_P")
_T = TypeVar("_T")


def patient(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Repeat ``call`` while its storage is away, for at most ``PATIENCE_SECONDS``; it must bear being repeated.

    The call raises a :class:`StudyError` where waiting does not help, or has not.

    Examples:
        >>> patient(lambda x: x + 1)(1)
        2
    """

    @wraps(call)
    def repeated(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call(*args, **kwargs)
            except (StorageInternalError, DBAPIError) as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                if time.monotonic() > deadline or any(words in reason for words in _LASTING):
                    raise StudyError(
                        f"--storage: cannot be used ({reason}); see to it and give the command again, what it has is kept"
                    ) from error
                time.sleep(RETRY_SECONDS)

    return repeated
