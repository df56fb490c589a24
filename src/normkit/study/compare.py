"""The main job from end to end: check, plan, run, measure the cost, report. A killed study resumes."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normkit._apply import recipes
from normkit.instruments.result import plain
from normkit.study.check import check
from normkit.study.config import OF_NAMED_DATA, StudyConfig
from normkit.study.environment import environment, redact, texts, together
from normkit.study.errors import StudyError
from normkit.study.folder import CHECKPOINTS, StudyFolder
from normkit.study.identity import study_name
from normkit.study.landscape.records import Trace
from normkit.study.landscape.run import study_traces
from normkit.study.load import load
from normkit.study.methods import parse_method
from normkit.study.plan import Slot, slots
from normkit.study.records import Cost, StudyRecord, TrialResult
from normkit.study.report.progress import Display, expected_seconds, plan_text, time_text
from normkit.study.report.trackers import Tracker
from normkit.study.store.connection import impatient
from normkit.study.store.fingerprint import check_fingerprint
from normkit.study.store.store import Store
from normkit.study.store.torchrun import follow, launched_rank, lead, rank_count
from normkit.study.store.worker import one_thread, run_here, run_workers
from normkit.study.task import Task
from normkit.study.train.cost import measure_costs

logger = logging.getLogger(__name__)


def assist(config: StudyConfig, out: Path | None = None) -> None:
    """Train on the ranks other than 0 under ``torchrun``; rank 0 reports."""
    task = load(config)
    config = config.judged_by(task.higher_is_better)
    follow(config, task, (out or Path("runs") / study_name(config)) / CHECKPOINTS)


def preview(config: StudyConfig, out: Path | None = None, *, workers: int = 0) -> str:
    """Return what ``compare`` would run, how many trials, about how long and where to; nothing is written.

    Args:
        config: What to compare.
        out: Output folder; default ``runs/`` and the study's name.
        workers: Trials side by side; 0 for one per core, one on a GPU.
    """
    check_workers(workers)
    task = check(config)
    config = config.judged_by(task.higher_is_better)
    with one_thread():
        expected = expected_seconds(config, measure_costs(config, task))
    plan = plan_text(config, task.summary, task.model_summary, out or Path("runs") / study_name(config))
    return f"{plan}\n{time_text(config, expected, workers or default_workers(config))}"


def compare(
    config: StudyConfig,
    out: Path | None = None,
    *,
    storage: str | None = None,
    workers: int = 0,
    quiet: bool = True,
    landscape: bool = False,
    track: Sequence[str] = (),
    retry_failed: bool = False,
    command: str = "normkit compare",
    task: Task | None = None,
) -> tuple[StudyRecord, Path]:
    """Run a study to its end, resuming where it was interrupted, and write its report.

    Args:
        config: What to compare.
        out: Output folder; default ``runs/`` and the study's name.
        storage: URL of an Optuna storage to share with other processes; default a SQLite file in ``out``.
        workers: Trials side by side; 0 for one per core, one on a GPU.
        quiet: Show no progress.
        landscape: Train every method once more under the instruments, and add what they show to the report.
        track: Names of experiment trackers that get every trial.
        retry_failed: Run trials that were closed as failed again.
        command: The command that makes the study, for the report.
        task: The task of a study that other processes cannot import; its trials run in this one.

    Returns:
        The record, and the folder with the report.

    Raises:
        StudyError: Bad input; nothing was run.
        KeyboardInterrupt: The user stopped it; there is a report of the trials that have ended, and the same call resumes.
    """
    check_workers(workers)
    here, task = task is not None, check(config, task)
    config = config.judged_by(task.higher_is_better)
    path = out or Path("runs") / study_name(config)
    folder = StudyFolder(path, config, command, redact(storage) if storage else None).prepare()
    address = folder.address(storage)
    store = address.store()
    store.open(config)
    check_fingerprint(store, config, task)
    folder.save()
    if retry_failed:
        store.retry_failed()
    if not store.has_ended() or store.get_attr("costs", _costs) is None:  # trials, or times, are from this machine
        store.set_attr(
            "environment", together(store.get_attr("environment", texts), environment(config.device) | rank_count())
        )
    store.set_attr("data", facts(task))
    count = workers or default_workers(config)
    alone = launched_rank() is None  # ranks measure at the end, when the others are gone
    try:
        with Display(quiet=quiet, metric=task.measure) as shown:
            shown.plan(slots(config, store.results()), config=config)
            shown.write(plan_text(config, task.summary, task.model_summary, path))
            if alone and store.get_attr("costs", _costs) is None:
                _measure(store, config, task)
            expected = expected_seconds(config, store.get_attr("costs", _costs) or ())
            side_by_side = 1 if here else count
            shown.plan(slots(config, store.results()), expected, side_by_side, config)
            shown.write(time_text(config, expected, side_by_side))
            trackers = [Tracker(name, path, folder.name, task.measure.column) for name in track]

            def on_progress(results: list[TrialResult], running: list[Slot]) -> None:
                shown.update(results, running)
                for tracker in trackers:
                    tracker.update(results)

            if here:
                run_here(address, config, task, on_progress)
            elif alone:
                run_workers(address, config, count, on_progress)
            else:
                lead(address, config, task, on_progress)
            if store.get_attr("costs", _costs) is None:
                _measure(store, config, task)
            if landscape and store.get_attr("landscape", _traces) is None:
                logger.info("measuring the landscape of every method")
                traces = study_traces(config, task, store.results())
                store.set_attr("landscape", [plain(trace) for trace in traces])
    except KeyboardInterrupt:
        with suppress(StudyError), impatient():
            report(folder, store)  # of what there is
        raise
    return report(folder, store), folder.path


def _measure(store: Store, config: StudyConfig, task: Task) -> None:
    logger.info("measuring time and memory per step")
    with one_thread():
        store.set_attr("costs", [vars(cost) for cost in measure_costs(config, task)])


def report(folder: StudyFolder, store: Store) -> StudyRecord:
    """Make the report of a study from its store, finished or not."""
    from normkit.study.report.render import write_report

    config = folder.config
    found = store.get_attr("data", dict) or {"chance": None, "chance_loss": None, "data_summary": config.subject}
    options = {name: value for name, value in config.to_dict().items() if not config.task or name not in OF_NAMED_DATA}
    trials = tuple(store.results())
    record = StudyRecord(
        config={**options, "reference": config.reference, "grown": store.get_attr("grown", list) or [], **found},
        environment=store.get_attr("environment", texts) or {},
        command=folder.command,
        trials=trials,
        costs=store.get_attr("costs", _costs) or (),
        planned=len(slots(config, trials)),
        recipes={m: _described(m) for m in config.methods},
        landscape=store.get_attr("landscape", _traces) or (),
    )
    write_report(record, folder.path)
    return record


def _described(method: str) -> dict[str, str]:
    recipe = recipes()[parse_method(method)[0]]
    return {"summary": recipe.summary, "paper": recipe.paper}


def facts(task: Task) -> dict[str, Any]:
    """Return what a report needs of a task, as plain data."""
    found = {"data": task.name, "model": task.model_summary, "data_summary": task.summary}
    return found | {"metric": asdict(task.measure), "chance": task.chance, "chance_loss": task.chance_loss}


def _costs(kept: list[dict[str, Any]]) -> tuple[Cost, ...]:
    return tuple(Cost(**cost) for cost in kept)


def _traces(kept: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    for trace in kept:
        Trace.from_dict(trace)  # what is none is damaged
    return tuple(kept)


def check_workers(count: int) -> None:
    """Check a number of worker processes, 0 for one per core.

    Raises:
        StudyError: It is negative.
    """
    if count < 0:
        raise StudyError(f"--workers {count}: give at least 1, or 0 for one per core")


def default_workers(config: StudyConfig) -> int:
    """Return the default number of trials side by side: one per core, one on a GPU."""
    return 1 if config.device.startswith("cuda") else available_cores()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
