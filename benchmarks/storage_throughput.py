"""Trials per second that a storage takes, and what is lost or doubled: python benchmarks/storage_throughput.py [--quick].

Worker processes claim trials and record them at once, without training, so that the storage is all that is measured; a
recorded trial carries a training curve as a real one does. In the last case workers are killed at random moments (at their start,
in a claim, in a trial, in a write) and replaced. The command fails if a trial is lost or doubled. Without
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
from normkit.study.store.store import Store
from normkit.study.store.worker import lock_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.study.store import idle_worker, postgres


def measure(url: str, workers: int, trials: int, kills: int) -> dict[str, object]:
    """Time from the first claim to the last result."""
    config = StudyConfig(methods=("batch",), seeds=trials, batch_sizes=(32,), lr=0.1)
    name = f"throughput-{workers}-{kills}-{time.time_ns()}"
    store = Store(url, name, lock_file(url))
    store.open(config)
    start = idle_worker.starter(url, config, 0.0, None, name)
    killed = idle_worker.run(start, workers, kills)
    everything = store.storage.get_all_trials(store.study_id, deepcopy=False)
    started = min(t.datetime_start for t in everything if t.datetime_start is not None)
    ended = max(t.datetime_complete for t in everything if t.datetime_complete is not None)
    seconds = (ended - started).total_seconds()
    recorded = [trial.user_attrs["slot"]["seed"] for trial in everything if "result" in trial.user_attrs]
    size = sum(len(str(trial.user_attrs)) for trial in everything) / len(everything)
    return {
        "storage": url.partition(":")[0].partition("+")[0],
        "workers": workers,
        "killed": killed,
        "killed_in_a_trial": sum(t.state == TrialState.FAIL for t in everything),
        "trials": trials,
        "trials_per_second": trials / seconds,
        "lost": trials - len(set(recorded)),
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
    """Measure 1, 4 and 16 workers, and 4 of which eight are killed and replaced."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer trials and workers; the result is not written")
    parser.add_argument("--storage", default="", metavar="URL")
    arguments = parser.parse_args()
    cases = ((1, 0), (2, 2)) if arguments.quick else ((1, 0), (4, 0), (16, 0), (4, 8))
    rows = []
    with storages(arguments.storage) as urls:
        for url in urls:
            for workers, kills in cases:
                row = measure(url, workers, 10 if arguments.quick else 30, kills)
                rows.append(row)
                print(
                    f"{row['storage']:>10}, {workers:>2} workers, {row['killed']:>2} killed: "
                    f"{row['trials_per_second']:.1f} trials/s, lost {row['lost']}, doubled {row['doubled']}, "
                    f"{row['bytes_per_trial']} bytes per trial"
                )
    if any(row["lost"] or row["doubled"] for row in rows):
        raise SystemExit("trials were lost or doubled")
    if not arguments.quick:
        save("storage_throughput", "python benchmarks/storage_throughput.py", rows)


if __name__ == "__main__":
    main()
