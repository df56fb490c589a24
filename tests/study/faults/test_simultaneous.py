"""Processes that start one study at the same moment work on it together."""

import os
import subprocess
import sys

import pytest

from normkit.study.config import StudyConfig
from normkit.study.plan import slots
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file

CONFIG = StudyConfig(methods=("batch",), batch_sizes=(8,), seeds=8, lr=0.1)
PROCESSES = 4

_START = """
import sys, time
from normkit.study.records import TrialResult
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file
from tests.study.faults.test_simultaneous import CONFIG
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1], "test", lock_file(sys.argv[1]))
store.open(CONFIG)
while (claim := store.claim()) is not None:
    store.record(claim, TrialResult(claim.key, "finished", validation_score=0.5, validation_loss=1.0))
    print(claim.slot.seed, flush=True)
"""


@pytest.mark.slow
def test_a_new_storage_is_made_by_one_of_several_processes_and_used_by_all(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _START, url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [process.communicate(timeout=200)[0].split() for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES
    assert sorted(int(seed) for seeds in done for seed in seeds) == list(range(8))
    store = Store(url, "test", lock_file(url))
    assert len(store.results()) == len(slots(CONFIG)) == len(store.storage.get_all_trials(store.study_id))
