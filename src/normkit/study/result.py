"""``normkit.compare``: a study from Python, in a script or a notebook."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from html import escape
from operator import index
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from normkit._errors import nearest
from normkit.study import compare as study
from normkit.study.config import StudyConfig
from normkit.study.environment import command_line
from normkit.study.errors import StudyError
from normkit.study.load import as_task, being_imported, import_path, load_task
from normkit.study.records import StudyRecord
from normkit.study.report.figures import by_batch_size, training_curves
from normkit.study.report.page import prose, render_template
from normkit.study.report.statistics import Summary, summarize
from normkit.study.report.verdict import Verdict, reach_verdict
from normkit.study.store.fingerprint import fingerprint
from normkit.study.store.torchrun import launched_rank
from normkit.study.task import Task
from normkit.study.train.checkpoint import alike

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The result of a study.

    Attributes:
        record: Everything the report is made from.
        folder: Folder with the report, ``results.json`` and ``trials.csv``.
    """

    record: StudyRecord
    folder: Path

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    @property
    def verdict(self) -> Verdict:
        """The finding in one sentence, and the caveats that belong to it."""
        return reach_verdict(self.record, summarize(self.record))

    def table(self) -> "DataFrame":
        """Return a table with one row per method and batch size: test score, difference to the reference, cost."""
        from pandas import DataFrame

        costs = {(cost.method, cost.batch_size): cost for cost in self.record.costs}
        score = f"test_{self.record.metric.column}"
        return DataFrame([_row(s, score, costs.get((s.method, s.batch_size))) for s in summarize(self.record)])

    def __str__(self) -> str:
        verdict = self.verdict
        return "\n".join([verdict.sentence, *verdict.caveats, f"report: {self.report}"])

    def _repr_html_(self) -> str:
        """The verdict, the main figure and the table, for a notebook."""
        verdict = self.verdict
        charts = by_batch_size(self.record, summarize(self.record))[:1] or [
            panel.chart for panel in training_curves(self.record)
        ]
        page = render_template("notebook.html.j2", charts=charts)
        figure = f'<iframe srcdoc="{escape(page)}" style="width:100%;height:460px;border:0"></iframe>' if charts else ""
        caveats = "".join(f"<p>{prose(caveat)}</p>" for caveat in verdict.caveats)
        return f"<p><b>{prose(verdict.sentence)}</b></p>{caveats}{figure}{self.table().to_html(index=False)}"


def compare(
    task: Task | Callable[[], Task] | str | None = None,
    *,
    out: str | Path | None = None,
    storage: str | None = None,
    workers: int = 0,
    landscape: bool = False,
    track: Sequence[str] = (),
    retry_failed: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Compare methods fairly on a task, and write a report; the same call resumes where it was interrupted.

    Worker processes import the task from its file, so a script calls this under ``if __name__ == "__main__":``. The trials of a
    task that cannot be imported, such as one of a notebook, run in this process, one after the other.

    Args:
        task: A task, a function that returns one, or ``FILE.py:name`` or ``package.module:name`` of either. None to give
            ``data`` and ``model`` by name among the options.
        out: Output folder; by default ``runs/`` and the study's name.
        storage: Any Optuna storage, to share the work with other processes; by default a SQLite file in ``out``.
        workers: Trials side by side; 0 for one per core, one on a GPU.
        landscape: Train every method once more under the instruments, and add what they show to the report.
        track: Experiment trackers that get every trial.
        retry_failed: Run trials that were closed as failed again.
        quiet: Show no progress.
        options: Every other option of ``normkit compare``, by the same name: ``methods``, ``batch_sizes``, ``budget``,
            ``seeds``, ``lr``, ``micro_batch`` ...; see [`StudyConfig`][normkit.study.config.StudyConfig].

    Returns:
        The record of the study, its verdict, table and report.

    Raises:
        StudyError: Bad input; nothing was run.
        SystemExit: Under ``torchrun``, in the processes of ranks other than 0 once the study has ended.

    Examples:
        >>> result = compare(data="digits", model="mlp", methods=["none", "batch"])  # doctest: +SKIP
        >>> print(result.verdict.sentence)  # doctest: +SKIP
    """
    if being_imported():
        raise StudyError(
            'a process of the study imports this script: call normkit.compare under `if __name__ == "__main__":`'
        )
    place, held = _placed(task, workers)
    config = _configured(place, options)
    folder = Path(out) if out is not None else None
    if launched_rank():
        study.assist(config, folder)
        raise SystemExit(0)
    record, path = study.compare(
        config,
        folder,
        storage=storage,
        workers=workers,
        quiet=quiet,
        landscape=landscape,
        track=track,
        retry_failed=retry_failed,
        command=_command(place, _plain(config, options), held is not None),
        task=held,
    )
    return Result(record, path)


def _placed(task: Task | Callable[[], Task] | str | None, workers: int) -> tuple[str | None, Task | None]:
    """The task's place, and the task itself where its trials must run in this process.

    Raises:
        StudyError: Several processes were asked for, and they cannot import the task.
    """
    if task is None or isinstance(task, str):
        return task, None
    given = as_task(task, "task")
    place = import_path(task)
    reason = "it is no global name of a script or module"
    if place is not None:
        try:
            if alike(fingerprint(load_task(place), "cpu"), fingerprint(given, "cpu")):
                return place, None
            reason = f"{place} is another one when it is imported; draw its samples from generators with a seed"
        except StudyError as error:
            if being_unguarded(error):
                raise
            reason = str(error)
    if workers > 1:
        raise StudyError(f"workers={workers}: processes cannot import task {given.name!r}: {reason}")
    logger.info("task %r: trials run in this process, one after the other (%s)", given.name, reason)
    return given.name, given


def being_unguarded(error: StudyError) -> bool:
    """Return whether importing the task failed since its script compares as it is imported."""
    return "__main__" in str(error)


def _configured(place: str | None, options: dict[str, Any]) -> StudyConfig:
    known = [field.name for field in fields(StudyConfig) if field.name not in ("task", "higher_is_better")]
    for name in options:
        if name not in known:
            raise StudyError(f"compare: unknown option {name!r}; {nearest(name, known)}")
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    for name in ("methods", "batch_sizes", "primary"):
        if name in plain and not isinstance(plain[name], tuple):
            raise StudyError(f"compare: {name}={plain[name]!r}; give a list")
    hints = get_type_hints(StudyConfig)
    return StudyConfig(task=place, **{name: _of_type(name, value, hints[name]) for name, value in plain.items()})


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """The value of an option as plain data of its type, NumPy's numbers as Python's.

    Raises:
        StudyError: It is of another type.
    """
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (UnionType, Union):
        return _of_union(name, value, parts)
    try:
        if kind is tuple and isinstance(value, tuple):
            kinds = parts[:1] * len(value) if parts[-1] is ... else parts
            return tuple(_of_type(name, item, part) for item, part in zip(value, kinds, strict=True))
        if kind is dict and isinstance(value, dict):
            return {key: _of_type(name, item, parts[1]) for key, item in value.items()}
        if kind is Literal and value in parts:
            return value
        if hint is Path:
            return Path(value)
        if hint in (bool, str) and isinstance(value, hint):
            return value
        if hint in (int, float) and not isinstance(value, bool | str):
            return index(value) if hint is int else float(value)
    except (TypeError, ValueError):
        pass
    raise StudyError(f"compare: {name}={value!r}; give {_in_words(hint)}")


def _of_union(name: str, value: Any, parts: tuple[Any, ...]) -> Any:
    if value is None and type(None) in parts:
        return None
    for part in parts:
        if part is not type(None):
            with suppress(StudyError):
                return _of_type(name, value, part)
    raise StudyError(f"compare: {name}={value!r}; give {' or '.join(map(_in_words, parts))}")


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "None" if hint is type(None) else str(hint) if get_args(hint) else hint.__name__


def _plain(config: StudyConfig, names: Iterable[str]) -> dict[str, Any]:
    """Options that were given, as the study has them."""
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _command(place: str | None, options: dict[str, Any], here: bool) -> str:
    """The command that repeats the study; a call, where the task has no place."""
    if here:
        return f"normkit.compare(task, {', '.join(f'{name}={value!r}' for name, value in options.items())})"
    arguments = ["compare", *(["--task", place] if place is not None else [])]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments += [flag] if value else []
        elif isinstance(value, dict):
            arguments += [flag, ",".join(f"{key}={item}" for key, item in value.items())]
        else:
            arguments += [flag, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return command_line(arguments)


def _row(summary: Summary, score: str, cost: Any) -> dict[str, Any]:
    paired = summary.paired
    return {
        "method": summary.method,
        "batch_size": summary.batch_size,
        "lr": summary.lr,
        "at_edge": summary.at_edge,
        score: summary.mean,
        "sd": summary.sd,
        "difference": paired.difference if paired else None,
        "low": paired.low if paired else None,
        "high": paired.high if paired else None,
        "p_holm": paired.p_holm if paired else None,
        "equivalence": paired.equivalence if paired else None,
        "exploratory": summary.exploratory,
        "step_seconds": cost.step_seconds if cost else None,
        "step_ratio": cost.step_ratio if cost else None,
        "memory_ratio": cost.memory_ratio if cost else None,
        "runs": summary.runs,
        "diverged": summary.diverged,
        "failed": summary.failed,
    }
