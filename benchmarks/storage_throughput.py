"""Cost of a trial's storage, and what is lost or doubled: python benchmarks/storage_throughput.py [--quick].

Worker processes claim trials and record them at once, without training, so that the storage is all that is measured; a
recorded trial carries a training curve as a real one does. The cost of a trial is given in processor time of its worker, which a
busy machine does not change, and as a share of the processor time that a trial of the default study trains at its largest batch
size; the wall's time beside it includes waiting for the disk. In the last case workers are killed at random moments (at their
start, in a claim, in a trial, in a write) and replaced. The command fails if a trial is lost or doubled. Without
``--storage URL`` a PostgreSQL server is started for it on loopback where one is installed, beside SQLite in a temporary folder.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import TrialState

from common import save
from normkit.study.config import StudyConfig
from normkit.study.load import load
from normkit.study.records import TrialKey
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file, one_thread
from normkit.study.train.trial import run_trial

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.study.store import idle_worker, postgres


def training_seconds() -> float:
    """Processor seconds that the shortest trial of the default study trains."""
    config = StudyConfig()
    task = load(config)
    key = TrialKey("final", "batch", max(config.batch_sizes), 0.1, 0)
    with one_thread():
        began = time.process_time()
        run_trial(config, key, task)
        return time.process_time() - began


def measure(url: str, workers: int, plan: int, trials: int | None, kills: int, training: float) -> dict[str, object]:
    """Cost of ``trials`` trials per worker of a plan, or of all of them."""
    config = StudyConfig(methods=("batch",), seeds=plan, batch_sizes=(32,), lr=0.1)
    name = f"throughput-{workers}-{kills}-{time.time_ns()}"
    store = Store(url, name, lock_file(url))
    began = time.perf_counter()
    store.open(config)
    planning = time.perf_counter() - began
    start = idle_worker.starter(url, config, 0.0, None, name, trials)
    killed = idle_worker.run(start, workers, kills)
    everything = store.storage.get_all_trials(store.study_id, deepcopy=False)
    started = min(t.datetime_start for t in everything if t.datetime_start is not None)
    ended = max(t.datetime_complete for t in everything if t.datetime_complete is not None)
    seconds = (ended - started).total_seconds()
    ended_trials = [trial for trial in everything if "result" in trial.user_attrs]
    recorded = [trial.user_attrs["slot"]["seed"] for trial in ended_trials]
    size = sum(len(str(trial.user_attrs)) for trial in ended_trials) / len(ended_trials)
    attributes = store.storage.get_study_user_attrs(store.study_id)
    costs = [value for key, value in attributes.items() if key.startswith("cost of ")]
    cost = sum(spent for spent, _ in costs) / sum(count for _, count in costs)
    began = time.perf_counter()
    Store(url, name, lock_file(url)).results()
    return {
        "storage": url.partition(":")[0].partition("+")[0],
        "workers": workers,
        "killed": killed,
        "killed_in_a_trial": sum(t.state == TrialState.FAIL for t in everything),
        "plan": plan,
        "planning_seconds": planning,
        "reading_seconds": time.perf_counter() - began,
        "trials": len(recorded),
        "processor_seconds_per_trial": cost,
        "share_of_training": cost / training,
        "trials_per_second": len(recorded) / seconds,
        "worker_seconds_per_trial": workers * seconds / len(recorded),
        "lost": (workers * trials if trials else plan) - len(set(recorded)),
        "doubled": len(recorded) - len(set(recorded)),
        "bytes_per_trial": round(size),
    }


@contextlib.contextmanager
def storages(given: str) -> Iterator[list[str]]:
    """The URL that was given, or SQLite and, where it is installed, PostgreSQL."""
    if given:
        yield [given]
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = [f"sqlite:///{folder}/study.db"]
        if postgres.programs() is not None:
            urls.append(stack.enter_context(postgres.server()).url)
        yield urls


def main() -> None:
    """Measure 1, 4 and 16 workers in a small and a large plan, and 4 of which eight are killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer trials and workers; the result is not written")
    parser.add_argument("--storage", default="", metavar="URL")
    arguments = parser.parse_args()
    cases: list[tuple[int, int, int | None, int]] = [(1, 10, None, 0), (2, 10, None, 2), (1, 1000, 10, 0)]
    if not arguments.quick:  # of the large plan each worker does some trials: a claim costs the most at the start
        cases = [(workers, 64, 64 // workers, 0) for workers in (1, 4, 16)]
        cases += [(workers, 10_000, 320 // workers, 0) for workers in (1, 4, 16)]
        cases.append((4, 64, None, 8))
    training = training_seconds()
    print(f"a trial of the default study trains {training:.2f} s of processor time")
    rows = []
    with storages(arguments.storage) as urls:
        for url in urls:
            for workers, plan, trials, kills in cases:
                row = measure(url, workers, plan, trials, kills, training)
                rows.append(row)
                print(
                    f"{row['storage']:>10}, {workers:>2} workers, plan of {plan}, {row['killed']:>2} killed: "
                    f"{1e3 * row['processor_seconds_per_trial']:.1f} ms of processor time per trial, "
                    f"{row['share_of_training']:.1%} of its training, {row['trials_per_second']:.1f} trials/s, "
                    f"lost {row['lost']}, doubled {row['doubled']}, {row['bytes_per_trial']} bytes per trial"
                )
    if any(row["lost"] or row["doubled"] for row in rows):
        raise SystemExit("trials were lost or doubled")
    if not arguments.quick:
        save(
            "storage_throughput",
            "python benchmarks/storage_throughput.py",
            {"training_processor_seconds": training, "cases": rows},
        )


if __name__ == "__main__":
    main()
