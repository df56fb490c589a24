"""A worker that claims and records without training: what it does to the storage is all that is tested with it."""

import random
import time

from evenkeel.study.plan import StudyConfig, slots
from evenkeel.study.records import TrialResult
from evenkeel.study.store import Store


def work(url: str, config: StudyConfig, pause: float) -> None:
    """Work until the study ends; a trial takes up to ``pause`` seconds."""
    store = Store(url, "idle")
    store.open(config)
    while len(store.results()) < len(slots(config)):
        claim = store.claim()
        if claim is None:
            store.free_dead()
            time.sleep(0.05)
            continue
        time.sleep(random.random() * pause)
        store.record(claim, TrialResult(claim.key, "finished", validation_accuracy=0.5, validation_loss=1.0))
