"""The main job from end to end: check, plan, run, measure the cost, report. A killed study goes on where it was."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sqlalchemy.engine import URL

from normkit._apply import recipes
from normkit.instruments.result import plain
from normkit.study.check import check
from normkit.study.data.dataset import Data
from normkit.study.environment import command_line, environment, together
from normkit.study.errors import StudyError
from normkit.study.landscape.run import study_traces
from normkit.study.plan import Slot, StudyConfig, slots
from normkit.study.records import Cost, StudyRecord, TrialResult
from normkit.study.report.progress import Display
from normkit.study.report.trackers import Tracker
from normkit.study.store.connection import redact
from normkit.study.store.fingerprint import hold
from normkit.study.store.store import Store, difference
from normkit.study.store.torchrun import follow, launched_rank, lead, rank_count
from normkit.study.store.worker import Place, lock_file, run_workers
from normkit.study.train.cost import measure_costs

STUDY_FILE = "study.json"
CHECKPOINTS = "checkpoints"
STORAGE_VARIABLE = "NORMKIT_STORAGE"


@dataclass(frozen=True)
class StudyFolder:
    """The output folder of one study: its configuration, and where its trials are kept.

    Attributes:
        path: The folder.
        config: Configuration of the study.
        command: The command that made it, credentials redacted.
        storage: URL of the storage, credentials redacted; None for the SQLite file in the folder.
    """

    path: Path
    config: StudyConfig
    command: str
    storage: str | None

    def prepare(self) -> None:
        """Make the folder; if it holds a study already, check that it is the same one.

        Raises:
            StudyError: The folder cannot be written, or holds another study, or the same one in another storage.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"--out {self.path}: cannot be made ({error.strerror}); give another folder") from error
        if not (self.path / STUDY_FILE).exists():
            return
        kept = StudyFolder.read(self.path)
        if kept.config != self.config:
            raise StudyError(difference(kept.config.to_dict(), self.config.to_dict()))
        if kept.storage != self.storage:
            places = [storage or "the folder's own file" for storage in (kept.storage, self.storage)]
            raise StudyError(
                f"--storage: the trials of {self.path} are in {places[0]}, not in {places[1]}; give that, or another --out"
            )

    def save(self) -> None:
        """Write ``study.json``, unless it is there.

        Raises:
            StudyError: The folder cannot be written.
        """
        file = self.path / STUDY_FILE
        if file.exists():
            return
        text = {"config": self.config.to_dict(), "command": self.command, "storage": self.storage}
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(text, indent=2) + "\n")
            part.replace(file)
        except OSError as error:
            raise StudyError(f"--out {self.path}: cannot be written ({error.strerror}); give another folder") from error

    @staticmethod
    def read(path: Path) -> "StudyFolder":
        """Read ``study.json`` of a folder.

        Raises:
            StudyError: There is none, or it is damaged.
        """
        file = path / STUDY_FILE
        try:
            text = json.loads(file.read_text())
            return StudyFolder(path, StudyConfig.from_dict(text["config"]), text["command"], text["storage"])
        except FileNotFoundError as error:
            raise StudyError(
                f"{path} holds no study (no {STUDY_FILE}); give a folder that `normkit compare` wrote"
            ) from error
        except OSError as error:
            raise StudyError(f"{file}: cannot be read ({error.strerror}); check the rights") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{file}: is damaged ({error}); remove it and give the command again") from error

    def place(self, storage: str | None) -> Place:
        """Where the trials are, given the storage's full URL if it is not in the folder.

        Raises:
            StudyError: The storage has a password, which is kept nowhere, and was not given.
        """
        if self.storage is None and storage is None:
            url = URL.create("sqlite", database=str(self.path / "study.db")).render_as_string()  # "?" and "%" quoted
            return Place(url, study_name(self.config), lock_file(url), self.path / CHECKPOINTS)
        url = storage or os.environ.get(STORAGE_VARIABLE) or self.storage or ""
        if "***" in url:
            raise StudyError(
                f"--storage: the trials are in {url}, and its password is kept nowhere; give the URL with --storage or in the "
                f"environment variable {STORAGE_VARIABLE}"
            )
        return Place(url, study_name(self.config), lock_file(url), self.path / CHECKPOINTS)


def study_name(config: StudyConfig) -> str:
    """Name of the study in its storage: equal configurations meet, different ones never do.

    Examples:
        >>> study_name(StudyConfig()) == study_name(StudyConfig()) != study_name(StudyConfig(seeds=4))
        True
    """
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:10]
    words = [Path(config.data).name, Path(config.model).name]
    plain = "".join(c if c.isalnum() else "-" for c in "-".join(words)).strip("-")
    return f"{plain}-{digest}"


def assist(config: StudyConfig, out: Path | None = None) -> None:
    """What the ranks other than 0 do in :func:`compare` under ``torchrun``: train along, report nothing."""
    follow(config, (out or Path("runs") / study_name(config)) / CHECKPOINTS)


def compare(
    config: StudyConfig,
    out: Path | None = None,
    *,
    storage: str | None = None,
    workers: int | None = None,
    quiet: bool = True,
    landscape: bool = False,
    track: Sequence[str] = (),
    arguments: Sequence[str] = ("compare",),
) -> tuple[StudyRecord, Path]:
    """Run a study to its end, or on from where it was, and write its report.

    Args:
        config: What to compare.
        out: Output folder; default ``runs/`` and the study's name.
        storage: URL of an Optuna storage to share with other processes; default a SQLite file in ``out``.
        workers: Trials side by side; default one per core, one on a GPU.
        quiet: Show no progress.
        landscape: Train every method once more under the instruments, and add what they show to the report.
        track: Names of experiment trackers that get every trial.
        arguments: The command line that was given, for the report.

    Returns:
        The record, and the folder with the report.

    Raises:
        StudyError: Bad input; nothing was run.
        KeyboardInterrupt: The user stopped it; there is a report of what has ended, and the same call goes on.
    """
    check_workers(workers or 0)
    path = out or Path("runs") / study_name(config)
    data = check(config)
    folder = StudyFolder(path, config, command_line(arguments), redact(storage) if storage else None)
    folder.prepare()
    place = folder.place(storage)
    store = place.store()
    store.open(config)
    hold(store, config, data)
    folder.save()
    if len(store.results()) < len(slots(config)):
        store.note("environment", together(store.noted("environment"), environment(config.device) | rank_count()))
    store.note("data", {"classes": data.classes, "data_summary": summary(data)})
    count = workers or (1 if config.device.startswith("cuda") else available_cores())
    try:
        with Display(quiet=quiet) as shown:
            shown.plan(slots(config))
            trackers = [Tracker(name, path, study_name(config), shown.message) for name in track]

            def watch(results: list[TrialResult], running: list[Slot]) -> None:
                shown.update(results, running)
                for tracker in trackers:
                    tracker.update(results)

            if launched_rank() is None:
                run_workers(place, config, count, watch)
            else:
                lead(place, config, data, watch)
            if store.noted("costs") is None:
                shown.message("measuring time and memory per step")
                torch.set_num_threads(1)
                store.note("costs", [vars(cost) for cost in measure_costs(config, data)])
            if landscape and store.noted("landscape") is None:
                shown.message("looking at the landscape of every method")
                traces = study_traces(config, data, store.results(), shown.message)
                store.note("landscape", [plain(trace) for trace in traces])
    except KeyboardInterrupt:
        report(folder, store)  # of what there is
        raise
    return report(folder, store), folder.path


def report(folder: StudyFolder, store: Store) -> StudyRecord:
    """Make the report of a study from its store, finished or not."""
    from normkit.study.report.render import write_report

    config = folder.config
    facts = store.noted("data") or {"classes": None, "data_summary": config.data}
    record = StudyRecord(
        config={**config.to_dict(), "reference": config.reference, **facts},
        environment=store.noted("environment") or {},
        command=folder.command,
        trials=tuple(store.results()),
        costs=tuple(Cost(**cost) for cost in store.noted("costs") or ()),
        planned=len(slots(config)),
        recipes={m: {"summary": recipes()[m].summary, "paper": recipes()[m].paper} for m in config.methods},
        landscape=tuple(store.noted("landscape") or ()),
    )
    write_report(record, folder.path)
    return record


def summary(data: Data) -> str:
    """The data in one line, for the report."""
    assert data.validation is not None
    sizes = f"{len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test examples"
    shape = "x".join(map(str, data.input_shape))
    trained = len(data.train.labels.unique())
    classes = f"{data.classes} classes" + (f" ({trained} of them in training)" if trained < data.classes else "")
    return f"{data.name}: {sizes} of {classes}, {shape} inputs" + (f". {data.note}" if data.note else "")


def check_workers(count: int) -> None:
    """Check a number of worker processes, 0 for one per core.

    Raises:
        StudyError: It is negative.
    """
    if count < 0:
        raise StudyError(f"--workers {count}: give at least 1, or 0 for one per core")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
