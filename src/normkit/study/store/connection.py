"""The connection to an Optuna storage: by its URL, and waited for while the storage is away."""

import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import optuna
from filelock import Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from normkit.study.environment import redact
from normkit.study.errors import StudyError

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 60
CONNECT_ATTEMPTS = 10
PATIENCE_SECONDS = 300.0  # a database server that restarts must not end a study
RETRY_SECONDS = 1.0
_SIMULTANEOUS = ("already exists", "database is locked", "duplicate key")
_LASTING = (  # SQLite's words
    *("database or disk is full", "disk I/O error", "readonly database"),
    *("unable to open", "malformed", "not a database"),
)

_waits: ContextVar[bool] = ContextVar("waits", default=True)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def connect(url: str) -> RDBStorage:
    """The storage at a SQLAlchemy URL, with heartbeats.

    Raises:
        DBAPIError: It cannot be opened.
        ValueError: No other process would see it.
    """
    if url.startswith("sqlite") and make_url(url).database in (None, "", ":memory:"):
        raise ValueError("it is in the memory of one process, give a file as sqlite:///FILE")
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    attempts = 0
    while True:
        try:
            with warnings.catch_warnings():  # heartbeats are marked experimental since 2021
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return RDBStorage(
                    url, engine_kwargs=options, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
                )
        except DBAPIError as error:  # several processes may make the tables of a new storage at the same moment
            attempts += 1
            simultaneous = isinstance(error, IntegrityError) or any(words in str(error) for words in _SIMULTANEOUS)
            if attempts == CONNECT_ATTEMPTS or not simultaneous:
                raise
            time.sleep(RETRY_SECONDS)


def _url(call: Callable[..., object], arguments: tuple[object, ...]) -> str | None:
    """URL of the storage that a call is for, whose secrets its errors may repeat."""
    for holder in (*arguments[:1], getattr(call, "__self__", None)):
        url = getattr(getattr(holder, "storage", holder), "url", None)
        if isinstance(url, str):
            return url
    return None


@contextmanager
def impatient() -> Generator[None, None, None]:
    """Within the block a storage that is away is not waited for: the user has asked the program to end.

    Yields:
        Nothing.
    """
    before = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(before)


def patient(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Repeat ``call`` while its storage is away, for at most ``PATIENCE_SECONDS``; it must bear being repeated.

    The call raises a ``StudyError`` where waiting does not help, or has not.

    Examples:
        >>> patient(lambda x: x + 1)(1)
        2
    """

    @wraps(call)
    def repeated(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        deadline = time.monotonic() + (PATIENCE_SECONDS if _waits.get() else 0)
        while True:
            try:
                return call(*args, **kwargs)
            except (StorageInternalError, DBAPIError, Timeout) as error:
                reason = redact(str(error.__cause__ or error).splitlines()[0], _url(call, args))
                if time.monotonic() >= deadline or any(words in reason for words in _LASTING):
                    raise StudyError(
                        f"--storage: cannot be used ({reason}); see to it and give the command again, what it has is kept"
                    ) from error
                time.sleep(RETRY_SECONDS)

    return repeated
