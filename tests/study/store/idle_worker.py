"""A worker that claims and records without training: what it does to the storage is all that is tested with it."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from normkit.study.config import StudyConfig
from normkit.study.plan import slots
from normkit.study.records import CurvePoint, TrialResult
from normkit.study.store import connection
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file

CURVE = tuple(CurvePoint(100 * i, 2.3 / i, 0.1 * (i % 10)) for i in range(1, 25))  # as long as a real one


def work(
    url: str,
    config: StudyConfig,
    pause: float,
    fatal_trial: int | None = None,
    name: str = "idle",
    trials: int | None = None,
) -> None:
    """Work until the study ends, or for ``trials`` trials.

    A trial takes up to ``pause`` seconds, and in one of them the worker is killed. What the storage cost this process, from its
    second claim on, is kept beside the trials: seconds of the processor and number of trials.
    """
    connection.HEARTBEAT_SECONDS = 1
    connection.GRACE_SECONDS = 10
    store = Store(url, name, lock_file(url))
    store.open(config)
    planned, claimed, began = len(slots(config)), 0, 0.0
    while claimed != trials:
        claim = store.claim()
        if claim is None:
            if len(store.results()) >= planned:
                break
            store.requeue()
            time.sleep(0.05)
            continue
        claimed += 1
        if claimed == fatal_trial:
            os.kill(os.getpid(), signal.SIGKILL)
        with store.heartbeat(claim):
            time.sleep(random.random() * pause)
            result = TrialResult(claim.key, "finished", validation_score=0.5, validation_loss=1.0, curve=CURVE)
            store.record(claim, result)
        if claimed == 1:  # the first claim has read the plan
            began = time.process_time()
    if claimed > 1:
        store.set_attr(f"cost of {os.getpid()}", [time.process_time() - began, claimed - 1])


def starter(*arguments: object) -> Callable[[], BaseProcess]:
    """Starts a process that runs :func:`work` with these arguments."""
    context = multiprocessing.get_context("forkserver")  # imports once, then forks
    context.set_forkserver_preload([__name__])

    def start() -> BaseProcess:
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    return start


def run(start: Callable[[], BaseProcess], workers: int, kills: int = 0, every: float = 0.2) -> int:
    """Run workers to the end of their study; meanwhile kill them at random moments, and start others in their place.

    Args:
        start: Starts a worker.
        workers: Workers side by side.
        kills: How many to kill, ``every`` so many seconds on average: at their start, in a claim, in a trial, in a write.
        every: Mean time between two kills.

    Returns:
        How many were killed before the study had ended.
    """
    running, killed = [start() for _ in range(workers)], 0
    while alive := [worker for worker in running if worker.is_alive()]:
        time.sleep(random.uniform(0, 2 * every))
        if killed < kills:
            random.choice(alive).kill()
            running.append(start())
            killed += 1
    for worker in running:
        worker.join()
    return sum(worker.exitcode == -signal.SIGKILL for worker in running)
