"""Workers: the study goes on, whatever happens to a process."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from optuna.trial import TrialState

from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.plan import slots
from normkit.study.store.worker import StoreAddress, run_workers

pytestmark = pytest.mark.slow  # each test starts processes
CONFIG = StudyConfig(methods=("batch", "none"), batch_sizes=(32,), seeds=2, lr_points=2, lr_extend=0, budget=96)

_RUN = """
import pathlib
if __name__ == "__main__":
    from tests.study.store.test_worker import CONFIG, address
    from normkit.study.store.worker import run_workers
    import dataclasses
    config = dataclasses.replace(CONFIG, budget={budget})
    run_workers(address(pathlib.Path({folder!r})), config, {count}, lambda results, running: None)
"""


def address(folder):
    return StoreAddress(f"sqlite:///{folder / 'study.db'}", "test", folder / "lock")


def script(folder, *, count=1, budget=96):
    file = folder / "run.py"
    file.write_text(_RUN.format(folder=str(folder), count=count, budget=budget))
    return subprocess.Popen(
        [sys.executable, str(file)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, start_new_session=True
    )


def results(folder):
    return {r.key: dataclasses.replace(r, seconds=0.0) for r in address(folder).store().results()}


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    outcome = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        assert script(folder, count=count).wait(timeout=120) == 0
        outcome.append(results(folder))
    assert len(outcome[0]) == len(slots(CONFIG))
    assert outcome[0] == outcome[1]


def test_a_study_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    config = dataclasses.replace(CONFIG, budget=3000)
    store = address(tmp_path).store()
    store.open(config)
    process = script(tmp_path, budget=3000)
    deadline = time.monotonic() + 90
    while not store.results() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone: its worker must end by itself
    process.wait()
    kept = results(tmp_path)
    assert 0 < len(kept) < len(slots(config))
    assert script(tmp_path, budget=3000).wait(timeout=120) == 0
    finished = results(tmp_path)
    assert len(finished) == len(slots(config))
    assert all(finished[key] == result for key, result in kept.items())
    times = [t for t in store.storage.get_all_trials(store.study_id) if "result" in t.user_attrs]
    assert len(times) == len(slots(config))  # nothing was run twice to an end


_FATAL_ONCE = """
import os, pathlib, signal
from normkit.study.models import build_model

def model(input_shape, classes):
    marker = pathlib.Path(__file__).with_suffix(".killed")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return build_model("digits-cnn", input_shape=input_shape, classes=classes)
"""


def test_a_worker_killed_in_a_trial_is_replaced_and_the_trial_run_again(tmp_path):
    (tmp_path / "fatal.py").write_text(_FATAL_ONCE)
    (tmp_path / "alone").mkdir()
    model = f"{tmp_path / 'fatal.py'}:model"
    config = dataclasses.replace(CONFIG, methods=("batch",), model=model, lr=0.1)
    for folder in (tmp_path, tmp_path / "alone"):  # in the second nobody is killed any more
        run_workers(address(folder), config, 1, lambda *_: None)
    store = address(tmp_path).store()
    trials = store.storage.get_all_trials(store.study_id)
    assert [t.state for t in trials].count(TrialState.FAIL) == 1
    assert results(tmp_path) == results(tmp_path / "alone")
    assert [result.state for result in results(tmp_path).values()] == ["finished"] * 2


def test_a_worker_that_cannot_load_the_data_ends_the_study_with_its_reason(tmp_path):
    with pytest.raises(StudyError, match=r"no\.module:here"):
        run_workers(address(tmp_path), dataclasses.replace(CONFIG, data="no.module:here"), 1, lambda *_: None)
