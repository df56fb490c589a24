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
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from normkit.study.config import StudyConfig
from normkit.study.errors import DataError, StudyError
from normkit.study.load import load
from normkit.study.plan import Slot, slots
from normkit.study.records import CurvePoint, TrialResult
from normkit.study.store import connection
from normkit.study.store.fingerprint import check_same_data, fingerprint
from normkit.study.store.owner import owner
from normkit.study.store.store import Claim, Store
from normkit.study.task import Task
from normkit.study.train.allocator import keep_freed_memory
from normkit.study.train.loop import from_first
from normkit.study.train.trial import run_trial

SHORTEST_POLL, LONGEST_POLL = 0.3, 10.0  # seconds
MAX_IDLE_DEATHS = 3
END_SECONDS = 5.0  # for a worker to end before it is killed
INTERRUPTIONS = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
}
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


def work(
    store: Store,
    config: StudyConfig,
    task: Task,
    checkpoints: Path | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Claim, train and record until every slot of the plan has ended; other ranks are told what to train and when to stop."""
    found = None
    while True:
        claim = store.claim()
        if on_progress is not None:
            on_progress(store.results(), store.running())
        if claim is not None:
            with store.heartbeat(claim):
                found = found or fingerprint(task, config.device)  # a model that ends the process does so in its trial
                watch = partial(_stops, store, claim) if config.prune else None
                from_first(claim.key)
                result = run_trial(config, claim.key, task, folder=checkpoints, fingerprint=found, on_point=watch)
            store.record(claim, result)
        elif store.has_ended():
            return
        else:  # what is left runs elsewhere, or waits for a search that does
            time.sleep(SHORTEST_POLL)
            store.requeue()


def _stops(store: Store, claim: Claim, point: CurvePoint) -> bool:
    """Return whether a run is given up at a point, by all ranks that train it."""
    return bool(from_first(store.below_median(claim, point)))


@contextlib.contextmanager
def one_thread() -> Generator[None, None, None]:
    """One torch thread within the block, so that results do not depend on the number of cores.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_here(address: StoreAddress, config: StudyConfig, task: Task, on_progress: Progress) -> None:
    """Run a study to its end in this process, one trial after the other.

    Args:
        address: Where its trials are kept.
        config: The study.
        task: Its task.
        on_progress: Called with results and running slots.
    """
    store = address.store()
    store.open(config)
    store.requeue()
    try:
        with one_thread():
            work(store, config, task, address.checkpoints, on_progress)
    finally:  # a notebook that stops a study goes on living: its trial must not wait for its end
        with contextlib.suppress(Exception), connection.impatient():
            store.requeue({owner(): None})


@dataclass
class _Worker:
    """A worker process, as its parent knows it."""

    process: BaseProcess
    owner: str
    messages: Connection

    def failure(self) -> str | None:
        """What the process said before it ended, if its end was no trial's fault."""
        with contextlib.suppress(EOFError, OSError):
            if self.messages.poll():
                return str(self.messages.recv())
        return None

    def end(self, seconds: float) -> None:
        """End the process, whatever it does: one that is stopped or hangs does not hear a request."""
        self.process.terminate()
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(seconds)


def run_workers(
    address: StoreAddress,
    config: StudyConfig,
    count: int,
    on_progress: Progress,
) -> None:
    """Run ``count`` worker processes to the end of the study, calling ``on_progress`` with results and running slots.

    A worker that dies (killed for memory, say) is replaced, and its trial is run again; where that happens too often the trial
    is closed as failed. However this function ends, its workers end with it, and what they were at waits for the next start.

    Raises:
        StudyError: A worker cannot load the data or write to the storage, or workers end before they begin a trial.
    """
    context = mp.get_context("spawn")
    store = address.store()
    store.open(config)
    store.requeue()

    def start() -> _Worker:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_worker_main, args=(address, config, sender), daemon=not config.data_workers)
        process.start()
        sender.close()
        return _Worker(process, owner(process.pid), receiver)

    workers: list[_Worker] = []
    idle_deaths = 0
    checked = time.monotonic()
    try:
        while True:
            looking = time.perf_counter()
            results = store.results()
            planned = len(slots(config, results))
            if len(results) >= planned:
                break
            on_progress(results, store.running())
            took = time.perf_counter() - looking
            for worker in [w for w in workers if w.process.exitcode is not None]:
                workers.remove(worker)
                if worker.process.exitcode == 0:
                    continue
                if (failure := worker.failure()) is not None:
                    raise StudyError(failure)
                died = _death(worker.process.exitcode)
                freed = store.requeue({worker.owner: died})
                idle_deaths = 0 if freed else idle_deaths + 1
                if idle_deaths > MAX_IDLE_DEATHS:
                    last = died or "it was stopped from outside"
                    raise StudyError(
                        f"workers end before their first trial; the last: {last}. Their output is above; a script must "
                        'call normkit.compare under `if __name__ == "__main__":`'
                    )
            if time.monotonic() - checked > connection.HEARTBEAT_SECONDS:
                freed = store.requeue()
                for worker in [w for w in workers if w.owner in freed]:  # stopped: no heartbeat for a while
                    workers.remove(worker)
                    worker.end(END_SECONDS)
                checked = time.monotonic()
            waiting = planned - len(results)
            while len(workers) < min(count, waiting):
                workers.append(start())
            time.sleep(poll_interval(took))
        on_progress(store.results(), [])
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end(END_SECONDS)
        with contextlib.suppress(Exception), connection.impatient():  # else the next start frees what they were at
            store.requeue({worker.owner: None for worker in workers})


def _death(exit_code: int | None) -> str | None:
    """How a worker died, or None where it was asked to end from outside, which is no trial's fault."""
    if exit_code is None or -exit_code in INTERRUPTIONS:
        return None
    text = f"the worker process ended with exit code {exit_code}"
    return text + (" (killed: out of memory?)" if exit_code == -signal.SIGKILL else "")


def _worker_main(address: StoreAddress, config: StudyConfig, messages: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _end_with_parent()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        store = address.store()
        store.config = config
        task = load(config)
        check_same_data(store, task)
        work(store, config, task, address.checkpoints)
    except Exception as error:  # not of a trial, whose errors are results: the parent says it, and the study ends
        known = isinstance(error, (StudyError, DataError))
        messages.send(str(error) if known else f"a worker failed: {type(error).__name__}: {error}")
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when its parent is gone, however it went."""
    parent = mp.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
