"""The connection to an Optuna storage, by its URL."""

import contextlib
import time
import warnings

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from normkit.study.store.patience import RETRY_SECONDS

HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 60
CONNECT_ATTEMPTS = 5


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
            if attempts == CONNECT_ATTEMPTS or "already exists" not in str(error):
                raise
            time.sleep(RETRY_SECONDS)


def redact(text: str, url: str | None = None) -> str:
    """``text`` without the password of a URL in it.

    Examples:
        >>> redact("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
    """
    source = url or text
    with contextlib.suppress(ArgumentError, ValueError):
        parsed = make_url(source)
        if parsed.password:
            text = text.replace(source, parsed.render_as_string(hide_password=True))
            text = text.replace(str(parsed.password), "***")
    return text
