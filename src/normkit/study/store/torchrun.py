"""Data-parallel trials: under ``torchrun`` all ranks train each trial together, each on its share of every batch.

Rank 0 claims and records; the others receive the key of each run. Every method gives the result of one process up to rounding:
BNP and batchless reduce their statistics over ranks, and ``normkit.study.train.gather_batch`` does it for all others.
"""

import gc
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.records import TrialKey
from normkit.study.store.worker import Progress, StoreAddress, work
from normkit.study.task import Task
from normkit.study.train.loop import from_first
from normkit.study.train.trial import run_trial

_WAIT = timedelta(days=1)  # ranks wait while rank 0 waits for other workers of the study


def launched_rank() -> int | None:
    """This process's rank if ``torchrun`` started it, else None."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def rank_count() -> dict[str, str]:
    """Lines for the report: how many ranks share every batch, and what batch statistics are taken over."""
    if launched_rank() is None:
        return {}
    ranks = os.environ["WORLD_SIZE"]
    batches = {"batch statistics": "synchronized over the ranks, except in micro-batches"} if int(ranks) > 1 else {}
    return {"data-parallel ranks": ranks, **batches}


def lead(address: StoreAddress, config: StudyConfig, task: Task, on_progress: Progress) -> None:
    """Rank 0's part: claim, train together with the other ranks, and record, until the study has ended.

    Args:
        address: Where the study is kept.
        config: The study.
        task: Its task.
        on_progress: Called with results and running slots.
    """
    store = address.store()
    store.open(config)
    store.requeue()
    with _process_group(config):
        work(store, config, task, address.checkpoints, on_progress)
        from_first(None)
        on_progress(store.results(), [])


def follow(config: StudyConfig, task: Task, checkpoints: Path | None) -> None:
    """The other ranks' part: train what rank 0 says until it says that nothing is left.

    Args:
        config: The study.
        task: Its task.
        checkpoints: Folder of checkpoints, as on rank 0, which alone reads and writes them.
    """
    with _process_group(config):
        while isinstance(key := from_first(None), TrialKey):
            watching = (lambda _: bool(from_first(None))) if config.prune else None
            run_trial(config, key, task, folder=checkpoints, on_point=watching)


@contextmanager
def _process_group(config: StudyConfig) -> Generator[None, None, None]:
    # The group of all ranks, while a study runs; its size is checked against every batch that ranks must share.
    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    for size, budget in product(config.batch_sizes, {config.budget, config.budget_of("search")}):
        last = budget % size or size
        if last < ranks:
            raise StudyError(
                f"--batch-sizes: {ranks} ranks cannot share a batch of {last} (batch size {size}, budget {budget}); "
                "start fewer ranks, or give batch sizes that divide the budget and are not smaller"
            )
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_WAIT)
    try:
        yield
        dist.barrier()  # a rank that leaves while gloo still serves another one aborts
    finally:
        gc.collect()  # models in reference cycles hold the group beyond its end
        dist.destroy_process_group()
