"""Only a worker that dies by itself, while its parent lives, counts against its trial; being stopped never does."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import sqlalchemy
from optuna.trial import TrialState

from normkit.study.config import StudyConfig
from normkit.study.folder import StudyFolder
from normkit.study.records import TrialResult
from normkit.study.store.owner import alive, owner
from normkit.study.store.store import MAX_DEATHS, Store
from normkit.study.store.worker import INTERRUPTIONS, lock_file, run_workers
from tests.study.store.test_worker import address

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
CONFIG = StudyConfig(methods=("batch",), batch_sizes=(32,), seeds=1, lr=0.1, budget=96)
LONG = [
    "--model",
    "digits-cnn",
    "--methods",
    "batch",
    "--batch-sizes",
    "1",
    "--lr",
    "0.01",
    "--seeds",
    "1",
    "--budget",
    "3000",
    "--workers",
    "1",
    "--quiet",
]


@pytest.fixture
def store(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = Store(url, "test", lock_file(url))
    store.open(CONFIG)
    return store


def test_a_trial_whose_workers_were_stopped_again_and_again_still_waits(store):
    for _ in range(2 * MAX_DEATHS):
        assert store.claim() is not None
        assert store.requeue({owner(): None}) == {owner()}
    assert store.results() == []
    assert store.claim() is not None


def test_stops_between_deaths_do_not_count(store):
    for reason in ("killed", None, "killed", None):
        assert store.claim() is not None
        store.requeue({owner(): reason})
        assert store.results() == []
    store.claim()
    store.requeue({owner(): "killed"})
    (result,) = store.results()
    assert (result.state, result.error) == ("failed", f"killed ({MAX_DEATHS} times)")


def test_a_failed_trial_is_run_again_on_request_its_deaths_forgotten(store):
    for _ in range(MAX_DEATHS):
        store.claim()
        store.requeue({owner(): "killed"})
    assert [result.state for result in store.results()] == ["failed"]
    assert store.retry_failed() == 1
    assert store.results() == []
    for _ in range(MAX_DEATHS - 1):
        assert store.claim() is not None
        store.requeue({owner(): "killed"})
    assert store.results() == []
    assert store.claim() is not None
    assert store.retry_failed() == 0


@pytest.mark.parametrize("at", ["claim", "record"])
def test_a_worker_killed_in_the_middle_of_a_write_has_written_nothing(store, at):
    before = store.claim() if at == "record" else None
    kept = store.storage.get_all_trials(store.study_id)

    def killed(*_):
        raise KeyboardInterrupt

    sqlalchemy.event.listen(store.storage.engine, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        store.record(before, TrialResult(before.key, "finished", validation_score=0.5)) if before else store.claim()
    sqlalchemy.event.remove(store.storage.engine, "commit", killed)
    assert store.storage.get_all_trials(store.study_id) == kept
    store.requeue({owner(): None})
    claim = store.claim()
    result = TrialResult(claim.key, "finished", validation_score=0.5, validation_loss=1.0)
    store.record(claim, result)
    assert store.results() == [result]


def renamed(part, value):
    """This process's name with one part of it changed: host, boot, namespace, number, start."""
    parts = owner().split("|")
    parts[part] = value
    return "|".join(parts)


@pytest.mark.parametrize("part", range(3), ids=["host", "boot", "namespace"])
def test_a_process_of_another_place_is_not_judged_by_its_number(part, store):
    other = renamed(part, "elsewhere").split("|")
    other[3] = str(2**22 + 1)  # no such process here
    claim = store.claim()
    store.storage.set_trial_user_attr(claim.trial_id, "owner", "|".join(other))
    assert store.requeue() == set()
    assert store.running() == [claim.slot]


@pytest.mark.skipif(sys.platform != "linux", reason="the start time of a process is read from /proc")
def test_a_process_number_that_was_given_again_is_another_process():
    assert alive(owner())
    assert not alive(renamed(4, "1"))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="needs the right to make PID namespaces"
)
def test_two_containers_with_one_host_name_leave_each_other_s_trials_alone(store, tmp_path):
    script = (
        "import sys, time; from normkit.study.store.store import Store; from normkit.study.store.worker import lock_file\n"
        "from tests.study.faults.test_interruptions import CONFIG\n"
        f"url = 'sqlite:///{tmp_path / 'study.db'}'; store = Store(url, 'test', lock_file(url)); store.config = CONFIG\n"
        "print(store.claim() is not None, flush=True); time.sleep(60)"
    )
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", script]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == "True\n"
        assert store.requeue() == set()
        assert len(store.running()) == 1
        process.kill()


_FATAL = """
import os, pathlib, signal
from normkit.study.models import build_model

def model(input_shape, classes):
    kept = pathlib.Path(__file__).with_suffix(".count")
    count = len(kept.read_text()) if kept.exists() else 0
    if count < {times}:
        kept.write_text("x" * (count + 1))
        os.kill(os.getpid(), signal.{signal})
    return build_model("digits-cnn", input_shape=input_shape, classes=classes)
"""


@pytest.mark.slow
def test_a_worker_that_is_asked_to_end_is_replaced_as_often_as_it_takes(tmp_path):
    (tmp_path / "own.py").write_text(_FATAL.format(times=MAX_DEATHS + 1, signal="SIGTERM"))
    assert signal.SIGTERM in INTERRUPTIONS
    config = StudyConfig(**{**vars(CONFIG), "model": f"{tmp_path / 'own.py'}:model"})
    run_workers(address(tmp_path), config, 1, lambda *_: None)
    assert [result.state for result in address(tmp_path).store().results()] == ["finished"]


@pytest.fixture
def heeds_hangups():
    """Processes that are started do not ignore SIGHUP, as they would where the tests run under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def started(out):
    """A command that works on a trial, in a process group of its own."""
    command = [sys.executable, "-m", "normkit", "compare", *LONG, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    while process.poll() is None:
        time.sleep(0.2)
        try:
            folder = StudyFolder.read(out)
            if (store := folder.address(None).store()).running():
                return process, store
        except (ValueError, KeyError):  # before the study is there
            continue
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("heeds_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_long_trial_stopped_three_times_finishes_and_no_trial_stays_running(number, tmp_path):
    out = tmp_path / "out"
    for _ in range(MAX_DEATHS):
        process, store = started(out)
        os.killpg(process.pid, number)  # what a scheduler does: the workers get it too
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}; nothing is lost: the same command resumes" in errors
        assert "Traceback" not in errors
        assert TrialState.RUNNING not in {trial.state for trial in store.storage.get_all_trials(store.study_id)}
    done = subprocess.run(
        [sys.executable, "-m", "normkit", "compare", *LONG, "--out", str(out)], env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0
    assert [result.state for result in store.results()] == ["finished"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_limit_on_file_sizes_costs_no_trial(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "normkit", "compare", "--methods", "batch", "--batch-sizes", "32", "--lr", "0.1"]
    command += ["--seeds", "12", "--budget", "96", "--workers", "2", "--quiet", "--out", str(out)]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))  # the database starts with 115 kB

    done = subprocess.run(command, preexec_fn=limit, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == 0
    results = StudyFolder.read(out).address(None).store().results()
    assert [result.state for result in results] == ["finished"] * 12
