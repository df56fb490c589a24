"""Workers: processes that claim slots of a study, train, and record, until nothing is left.

Trials run with one torch thread each, so that a result depends on its key alone and not on how many run side by side.
"""

import contextlib
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from normkit.study.config import StudyConfig
from normkit.study.errors import DataError, StudyError
from normkit.study.load import load
from normkit.study.plan import Slot, slots
from normkit.study.records import TrialResult
from normkit.study.store.store import Store, owner
from normkit.study.task import Task
from normkit.study.train.trial import run_trial

SHORTEST_POLL, LONGEST_POLL = 0.3, 10.0  # seconds
MAX_IDLE_DEATHS = 3
Progress = Callable[[list[TrialResult], list[Slot]], None]  # called with results and running slots


@dataclass(frozen=True)
class StoreAddress:
    """Where a study's trials are kept, and all that a worker process needs to open them."""

    url: str
    name: str
    lock: Path | None = None
    checkpoints: Path | None = None

    def store(self) -> Store:
        """Open the storage."""
        return Store(self.url, self.name, self.lock)


def lock_file(url: str) -> Path | None:
    """The lock that all processes on one SQLite file share: SQLite has no row locks. None for other storages.

    Examples:
        >>> str(lock_file("sqlite:///runs/study.db")), lock_file("postgresql://host/studies")
        ('runs/study.db.lock', None)
    """
    with contextlib.suppress(ArgumentError):  # no URL, which opening it will tell
        parsed = make_url(url)
        if parsed.drivername.startswith("sqlite"):
            return Path(f"{parsed.database}.lock")
    return None


def poll_interval(seconds: float) -> float:
    """Return the time to wait before the next read of the store, 50 times as long as the last one took.

    So reading takes at most 2 % of the time, however big the study or far the storage is, within the two bounds.

    Args:
        seconds: Duration of the last read.

    Examples:
        >>> poll_interval(0.001), poll_interval(0.1), poll_interval(2.0)
        (0.3, 5.0, 10.0)
    """
    return min(max(50 * seconds, SHORTEST_POLL), LONGEST_POLL)


def work(store: Store, config: StudyConfig, task: Task, checkpoints: Path | None = None) -> None:
    """Claim, train and record until every slot of the plan has ended."""
    planned = len(slots(config))
    while True:
        claim = store.claim()
        if claim is not None:
            with store.heartbeat(claim):
                watch = partial(store.below_median, claim) if config.prune else None
                result = run_trial(config, claim.key, task, folder=checkpoints, on_point=watch)
            store.record(claim, result)
        elif len(store.results()) >= planned:
            return
        else:  # what is left runs elsewhere, or waits for a search that does
            time.sleep(SHORTEST_POLL)
            store.requeue_dead()


def run_workers(
    address: StoreAddress,
    config: StudyConfig,
    count: int,
    on_progress: Progress,
) -> None:
    """Run ``count`` worker processes to the end of the study, calling ``on_progress`` with results and running slots.

    A worker that dies (killed for memory, say) closes its trial as failed and is replaced.

    Raises:
        StudyError: Workers end before they begin a trial.
    """
    context = mp.get_context("spawn")
    store = address.store()
    store.open(config)
    store.requeue_dead()
    planned = len(slots(config))

    def start() -> BaseProcess:
        process = context.Process(target=_worker_main, args=(address, config), daemon=True)
        process.start()
        return process

    workers: list[BaseProcess] = []
    idle_deaths = 0
    try:
        while True:
            looking = time.perf_counter()
            results = store.results()
            if len(results) >= planned:
                break
            on_progress(results, store.running())
            took = time.perf_counter() - looking
            gone = [w for w in workers if w.exitcode not in (None, 0)]
            died = ""
            for worker in gone:
                holder = owner(worker.pid)
                died = f"the worker process ended with exit code {worker.exitcode}"
                if worker.exitcode == -signal.SIGKILL:
                    died += " (killed: out of memory?)"
                idle_deaths = 0 if store.requeue_dead([holder], error=died) else idle_deaths + 1
            if idle_deaths > MAX_IDLE_DEATHS:
                raise StudyError(f"workers end before their first trial; the last: {died}")
            workers = [w for w in workers if w.exitcode is None]
            waiting = planned - len(results)
            while len(workers) < min(count, waiting):
                workers.append(start())
            time.sleep(poll_interval(took))
        on_progress(store.results(), [])
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _worker_main(address: StoreAddress, config: StudyConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _end_with_parent()
    torch.set_num_threads(1)
    try:
        store = address.store()
        store.config = config
        work(store, config, load(config), address.checkpoints)
    except (StudyError, DataError) as error:  # a line, as the parent would say it
        sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    """End this process when its parent is gone, however it went."""
    parent = mp.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
