"""A worker that is stopped or hangs holds nobody up."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from filelock import FileLock
from sqlalchemy.exc import OperationalError

from normkit.cli.main import main
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.store import connection
from normkit.study.store import store as store_module
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file, run_workers
from tests.study.store.test_worker import address

_STOPS = """
import os, pathlib, signal
from normkit.study.models import build_model

def model(input_shape, classes):
    marker = pathlib.Path(__file__).with_suffix(".stopped")
    if not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return build_model("digits-cnn", input_shape=input_shape, classes=classes)
"""


@pytest.mark.slow
def test_a_worker_that_is_stopped_in_its_trial_loses_it_and_does_not_delay_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "normkit.study.store.connection.HEARTBEAT_SECONDS", 1
    )  # the parent's alone: it looks every second
    monkeypatch.setattr("normkit.study.store.connection.GRACE_SECONDS", 20)
    (tmp_path / "own.py").write_text(_STOPS)
    config = StudyConfig(
        methods=("batch",), model=f"{tmp_path / 'own.py'}:model", batch_sizes=(32,), seeds=1, lr=0.1, budget=96
    )
    run_workers(address(tmp_path), config, 1, lambda *_: None)
    assert [result.state for result in address(tmp_path).store().results()] == ["finished"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "own.stopped").read_text()), 0)


@pytest.mark.slow
def test_a_worker_that_is_stopped_at_the_end_of_a_study_ends_with_it(tmp_path):
    config = StudyConfig(methods=("batch",), batch_sizes=(32,), seeds=2, lr=0.1, budget=96)
    stopped = []

    def stop_one(results, running):
        if results and not stopped:
            worker = multiprocessing.active_children()[0]
            stopped.append(worker.pid)
            os.kill(worker.pid, signal.SIGSTOP)

    run_workers(address(tmp_path), config, 2, stop_one)
    assert len(address(tmp_path).store().results()) == 2
    for pid in stopped:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_was_stopped_with_the_lock_is_waited_for_a_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr("normkit.study.store.connection.PATIENCE_SECONDS", 0.0)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = Store(url, "test", lock_file(url))
    store.open(StudyConfig())
    with FileLock(lock_file(url)):
        began = time.monotonic()
        with pytest.raises(StudyError, match=r"--storage: cannot be used .*lock"):
            store.claim()
        assert time.monotonic() - began < 30
    assert store.claim() is not None


def test_a_worker_that_starts_while_the_lock_is_held_for_long_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr("normkit.study.store.connection.RETRY_SECONDS", 0.1)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    lock = FileLock(lock_file(url), thread_local=False)
    lock.acquire()
    threading.Timer(1.0, lock.release).start()
    Store(url, "test", lock_file(url)).open(StudyConfig())
    assert not lock.is_locked


def test_ctrl_c_while_the_storage_is_away_ends_the_command(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OperationalError("SELECT", {}, ConnectionRefusedError("connection refused"))

    def interrupted(*_):
        monkeypatch.setattr("normkit.study.store.rows.Rows.refresh", refused)
        raise KeyboardInterrupt

    monkeypatch.setattr("normkit.study.compare.run_workers", interrupted)
    monkeypatch.setattr("normkit.study.compare.measure_costs", lambda *_: [])
    began = time.monotonic()
    study = ["--methods", "batch", "--batch-sizes", "8", "--budget", "8", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["compare", *study]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert time.monotonic() - began < connection.PATIENCE_SECONDS / 2
