"""A worker that claims and records without training: what it does to the storage is all that is tested with it."""

import os
import random
import signal
import time

from evenkeel.study import store as store_module
from evenkeel.study.plan import StudyConfig, slots
from evenkeel.study.records import TrialResult
from evenkeel.study.store import Store


def work(url: str, config: StudyConfig, pause: float, fatal_trial: int | None = None) -> None:
    """Work until the study ends; a trial takes up to ``pause`` seconds, and one of them is killed in the middle."""
    store_module.GRACE_SECONDS = 2  # a claim whose answer was lost with the server is free again after it
    store = Store(url, "idle")
    store.open(config)
    claimed = 0
    while len(store.results()) < len(slots(config)):
        claim = store.claim()
        if claim is None:
            store.free_dead()
            time.sleep(0.05)
            continue
        claimed += 1
        if claimed == fatal_trial:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(random.random() * pause)
        store.record(claim, TrialResult(claim.key, "finished", validation_accuracy=0.5, validation_loss=1.0))
