"""Many workers on one PostgreSQL storage: nothing is lost or counted twice, whatever is killed or restarted."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from optuna.trial import TrialState

from normkit.cli.main import main
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.plan import slots
from normkit.study.records import TrialResult
from normkit.study.store.join_studies import join, waiting_studies
from normkit.study.store.store import Store
from tests.study.store import idle_worker, postgres

pytest.importorskip("psycopg2", reason="needs a PostgreSQL driver")
if postgres.programs() is None:
    pytest.skip("PostgreSQL is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow
CONFIG = StudyConfig(methods=("batch", "none"), batch_sizes=(32,), seeds=2, lr_points=2, lr_extend=0, budget=96)


@pytest.fixture(scope="module")
def server():
    with postgres.server() as made:
        yield made


@pytest.fixture
def url(server):
    """The server's URL, its database empty."""
    from sqlalchemy import create_engine, text

    engine = create_engine(server.url)
    with engine.begin() as connection:
        connection.execute(text("drop schema public cascade"))
        connection.execute(text("create schema public"))
    engine.dispose()
    return server.url


def idle_config(trials):
    return StudyConfig(methods=("batch",), batch_sizes=(32,), seeds=trials, lr=0.1)


def idle_workers(url, config, count, pause, fatal_trial=None):
    start = idle_worker.starter(url, config, pause, fatal_trial)
    return [start() for _ in range(count)]


def exit_codes(workers):
    for worker in workers:
        worker.join(timeout=120)
    return [worker.exitcode for worker in workers]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def all_ended_once(url, config):
    store = Store(url, "idle")
    keys = [(r.key.method, r.key.batch_size, r.key.seed) for r in store.results()]
    recorded = [t for t in store.storage.get_all_trials(store.study_id) if "result" in t.user_attrs]
    assert len(keys) == len(set(keys)) == len(slots(config))
    assert len(recorded) == len(slots(config))


def test_workers_share_a_study_without_loss_or_doubles(url):
    config = idle_config(12)
    assert exit_codes(idle_workers(url, config, 4, pause=0.02)) == [0] * 4
    all_ended_once(url, config)


def test_workers_killed_in_the_middle_of_trials_lose_and_double_nothing(url):
    config = idle_config(8)
    store = Store(url, "idle")
    store.open(config)
    doomed = [w for n in (1, 2, 3) for w in idle_workers(url, config, 1, pause=0.1, fatal_trial=n)]
    assert set(exit_codes(doomed)) == {-signal.SIGKILL}
    assert len(store.results()) == 0 + 1 + 2
    assert len(store.running()) == 3
    assert exit_codes(idle_workers(url, config, 2, pause=0.02)) == [0, 0]
    all_ended_once(url, config)
    dead = [t for t in store.storage.get_all_trials(store.study_id) if t.state == TrialState.FAIL]
    assert len(dead) == 3


def test_workers_killed_at_random_moments_lose_and_double_nothing(url):
    config = idle_config(12)
    killed = idle_worker.run(idle_worker.starter(url, config, 0.02), workers=3, kills=4)
    assert killed > 0
    all_ended_once(url, config)


def test_a_server_that_restarts_ends_no_worker(server, url):
    config = idle_config(8)
    store = Store(url, "idle")
    store.open(config)
    workers = idle_workers(url, config, 1, pause=0.8)  # one, so that none is still connecting
    until(store.running)
    server.restart(away_seconds=1.0)
    assert len(store.results()) < 8
    assert exit_codes(workers) == [0]
    all_ended_once(url, config)


def test_a_worker_without_a_heartbeat_loses_its_trial_to_another(url, monkeypatch):
    monkeypatch.setattr("normkit.study.store.connection.HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr("normkit.study.store.connection.GRACE_SECONDS", 1)
    config = idle_config(1)
    silent, other = Store(url, "idle"), Store(url, "idle")
    silent.open(config)
    other.open(config)
    claim = silent.claim()
    silent.storage.set_trial_user_attr(claim.trial_id, "owner", "another-machine:1")
    with silent.heartbeat(claim):
        time.sleep(2.5)
        assert other.requeue() == set()  # it beats
    time.sleep(2.5)
    assert other.requeue() == {"another-machine:1"}
    taken = other.claim()
    assert taken.slot == claim.slot
    other.record(taken, TrialResult(taken.key, "finished", validation_score=0.9, validation_loss=1.0))
    silent.record(claim, TrialResult(claim.key, "finished", validation_score=0.1, validation_loss=1.0))
    assert [r.validation_score for r in other.results()] == [0.9]


@pytest.mark.timeout(1500)
def test_normkit_worker_shares_a_comparison_and_nothing_depends_on_it(url, tmp_path):
    arguments = ["--methods", "batch,none", "--batch-sizes", "32", "--seeds", "2", "--budget", "96"]
    arguments += ["--lr-points", "2", "--lr-extend", "0"]
    command = [sys.executable, "-m", "normkit.cli.main"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [
            *command,
            "compare",
            *arguments,
            "--storage",
            url,
            "--out",
            str(tmp_path / "shared"),
            "--workers",
            "1",
            "--quiet",
        ],
        env=environment,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if waiting_studies(url):
                break
        except StudyError:  # its tables are being made
            pass
        time.sleep(0.3)
    worker = subprocess.run(
        [*command, "worker", "--storage", url, "--workers", "1", "--checkpoints", str(tmp_path / "checkpoints")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert run.wait(timeout=600) == 0
    assert "8 of 8 trials have ended" in worker.stderr
    assert "worked on 1 study" in worker.stdout
    assert main(["compare", *arguments, "--out", str(tmp_path / "alone"), "--workers", "1", "--quiet"]) == 0
    from normkit.study.folder import StudyFolder

    shared, alone = (
        StudyFolder.read(tmp_path / name).address(url if name == "shared" else None).store()
        for name in ("shared", "alone")
    )
    outcomes = [{r.key: dataclasses.replace(r, seconds=0.0) for r in s.results()} for s in (shared, alone)]
    assert outcomes[0] == outcomes[1]
    written = "".join(p.read_text(errors="replace") for p in (tmp_path / "shared").rglob("*") if p.is_file())
    assert "secret" not in written


def test_a_study_that_is_not_there_is_named(url):
    Store(url, "idle").open(idle_config(1))
    with pytest.raises(StudyError, match="did you mean 'idle'"):
        join(url, "idel", 1, None, lambda _: None)


def test_worker_without_a_storage_says_what_to_give(monkeypatch, capsys):
    monkeypatch.delenv("NORMKIT_STORAGE", raising=False)
    assert main(["worker"]) == 2
    assert "--storage is empty; give the URL" in capsys.readouterr().err


def test_the_heartbeat_thread_ends_with_the_trial(url):
    store = Store(url, "idle")
    store.open(idle_config(1))
    before = threading.active_count()
    with store.heartbeat(store.claim()):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
