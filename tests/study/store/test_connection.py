"""A storage that is away is waited for; one that cannot come back is told at once."""

import sqlite3

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from normkit.study.errors import StudyError
from normkit.study.store import connection as patience
from normkit.study.store.connection import patient


def failing(reason, times):
    """A call that fails ``times`` times as Optuna on SQLite does, then gives how often it was called."""
    calls = []

    @patient
    def call():
        calls.append(reason)
        if len(calls) <= times:
            raise StorageInternalError from OperationalError("INSERT", {}, sqlite3.OperationalError(reason))
        return len(calls)

    return call, calls


@pytest.mark.parametrize(
    "reason", ["database or disk is full", "attempt to write a readonly database", "database disk image is malformed"]
)
def test_what_waiting_does_not_help_is_told_at_once(reason):
    call, calls = failing(reason, times=1)
    with pytest.raises(StudyError, match=f"--storage: cannot be used .*{reason}.*give the command again"):
        call()
    assert calls == [reason]


def test_a_locked_file_is_waited_for(monkeypatch):
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.0)
    call, _ = failing("database is locked", times=3)
    assert call() == 4


def test_after_long_enough_a_storage_that_stays_away_is_told(monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", -1.0)
    call, calls = failing("database is locked", times=2)
    with pytest.raises(StudyError, match="database is locked"):
        call()
    assert len(calls) == 1


def test_a_program_that_is_asked_to_end_does_not_wait():
    call, calls = failing("database is locked", times=1)
    with patience.impatient(), pytest.raises(StudyError, match="database is locked"):
        call()
    assert len(calls) == 1
    assert call() == 2
