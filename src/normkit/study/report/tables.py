"""The tables of a report: one per batch size, one row per method; page, Markdown and terminal set the same cells."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from normkit.study.records import Cost, Metric, StudyRecord
from normkit.study.report.caveats import margin_text
from normkit.study.report.chart import interval, swatch
from normkit.study.report.figures import series_index
from normkit.study.report.format import (
    difference_unit,
    format_bytes,
    format_difference,
    format_number,
    format_p,
    format_score,
    format_seconds,
    in_unit,
)
from normkit.study.report.statistics import Paired, Summary, plan_axes, second_reference

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: the value, what qualifies it, what went wrong, and a small drawing for the page."""

    text: str
    note: str = ""
    alarm: str = ""
    figure: Markup | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.text, self.note, self.alarm) if part)


@dataclass(frozen=True)
class Row:
    """One method at one batch size; ``note`` says where its comparison stands, if comparisons were named beforehand."""

    method: str
    note: str
    reference: bool
    swatch: Markup
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """One row per method; ``columns`` (title, unit) head the cells, the method's own column left out."""

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class FailedRuns:
    """Runs that went wrong in the same way."""

    runs: int
    phase: str
    method: str
    batch_size: int
    what: str


def tables(record: StudyRecord, summaries: Sequence[Summary]) -> list[Table]:
    """One table per batch size; columns that no method has a value for are left out."""
    return [_table(record, size, [s for s in summaries if s.batch_size == size]) for size in plan_axes(record)[1]]


def failed_runs(record: StudyRecord) -> list[FailedRuns]:
    """Runs that diverged or failed and costs that could not be measured, those that ended alike counted together."""
    alike = Counter(
        (t.key.phase, t.key.method, t.key.batch_size, f"{t.state}: {t.error}" if t.error else t.state)
        for t in record.trials
        if t.state in {"diverged", "failed"}
    )
    alike.update(("cost", c.method, c.batch_size, f"not measured: {c.error}") for c in record.costs if c.error)
    return [FailedRuns(runs, *what) for what, runs in alike.items()]


def selection_note(record: StudyRecord) -> str:
    """Describe which weights were tested, when they were taken and what validation cost; empty if they are the last.

    Args:
        record: A study, finished or not.
    """
    if not record.config.get("best_weights"):
        return ""
    text = (
        f"Each run is tested at its best checkpoint by validation {record.metric.name}, checked after every epoch and at some "
        "points of its curve"
    )
    ran = [trial for trial in record.trials if trial.best_step is not None and trial.key.phase == "final"]
    if not ran:
        return text + "."
    budget = record.config["budget"]
    places = [100 * (trial.best_step or 0) / math.ceil(budget / trial.key.batch_size) for trial in ran]
    share = 100 * sum(trial.validation_seconds for trial in ran) / max(sum(trial.seconds for trial in ran), 1e-9)
    return (
        f"{text}; in the final runs they were taken after {min(places):.0f} to {max(places):.0f} % of the steps (median "
        f"{median(places):.0f} %). The extra validation took {share:.1f} % of the time of these runs."
    )


def _table(record: StudyRecord, batch_size: int, here: Sequence[Summary]) -> Table:
    costs = {cost.method: cost for cost in record.costs if cost.batch_size == batch_size}
    reference, index = record.config["reference"], series_index(record)
    second = second_reference(record)
    paired = [pair for s in here for pair in (s.paired, s.second) if pair]
    reach = max((abs(end) for pair in paired for end in (pair.low, pair.high, pair.difference) if end), default=0.0)
    on_gpu = str(record.config.get("device")).startswith("cuda")
    metric = record.metric
    columns = {
        (f"test {metric.name}", _score_heading(metric)): [_score(s, metric) for s in here],
        (f"difference to {reference}", f"{difference_unit(metric)} [95 % interval]".lstrip()): [
            Cell("reference" if len(here) > 1 else NOTHING)
            if s.method == reference
            else _difference(s.paired, index[s.method], reach, metric)
            for s in here
        ],
        ("p", "Holm"): [_p(s.paired) for s in here],
        **_margin_column(record, [s.paired for s in here], reference),
        **(_second_columns(record, here, second, index, reach) if second else {}),
        ("learning rate", "chosen"): [_rate(s) for s in here],
        ("time", "per step [quartiles]"): [_time(costs.get(s.method), s.method == reference) for s in here],
        ("memory", "peak" if on_gpu else "for backward"): [
            _memory(costs.get(s.method), s.method == reference) for s in here
        ],
        ("train/eval gap", "nats" if record.config["chance_loss"] else "of the loss"): [
            Cell(f"{s.gap:+.3f}".replace("-", "−") if s.gap is not None else NOTHING) for s in here
        ],
    }
    kept = {head: cells for head, cells in columns.items() if any(str(cell) != NOTHING for cell in cells)}
    rows = [
        Row(
            s.method,
            _standing(s, second),
            s.method == reference,
            swatch(index[s.method]),
            tuple(cells[k] for cells in kept.values()),
        )
        for k, s in enumerate(here)
    ]
    return Table(f"Batch size {batch_size}", tuple(kept), tuple(rows))


def _standing(summary: Summary, second: str | None) -> str:
    return "second reference" if summary.method == second else "exploratory" if summary.exploratory else ""


def _second_columns(
    record: StudyRecord, here: Sequence[Summary], second: str, index: dict[str, int], reach: float
) -> dict[tuple[str, str], list[Cell]]:
    """What the primary methods' differences to the second reference are."""
    metric = record.metric
    return {
        (f"against {second}", f"{difference_unit(metric)} [95 % interval]".lstrip()): [
            Cell("reference") if s.method == second else _difference(s.second, index[s.method], reach, metric)
            for s in here
        ],
        (f"p against {second}", "Holm"): [_p(s.second) for s in here],
        **_margin_column(record, [s.second for s in here], second),
    }


def _margin_column(
    record: StudyRecord, pairs: Sequence[Paired | None], reference: str
) -> dict[tuple[str, str], list[Cell]]:
    """What the 90 % intervals say of the margin; no column without one."""
    if record.config.get("margin") is None:
        return {}
    cells = [Cell((pair.equivalence if pair else None) or NOTHING) for pair in pairs]
    return {(f"within {margin_text(record)}", f"of {reference}, 90 % interval"): cells}


def _score_heading(metric: Metric) -> str:
    unit = "" if metric.unit == "%" else in_unit(metric.unit)
    return f"mean ± sd{unit}{'' if metric.higher_is_better else ' (lower is better)'}"


def _score(summary: Summary, metric: Metric) -> Cell:
    lost = [
        f"{word} {n} of {summary.runs}" for word, n in (("diverged", summary.diverged), ("failed", summary.failed)) if n
    ]
    if not summary.runs:
        return Cell(NOTHING, "not run yet")
    show = format_score if metric.unit == "%" else format_number
    text = show(metric, summary.mean) if summary.mean is not None else NOTHING
    spread = f"± {_deviation(summary.sd, metric)}" if summary.sd is not None else ""
    return Cell(text, spread, ", ".join(lost))


def _deviation(sd: float, metric: Metric) -> str:
    return format_number(metric, sd) if metric.unit == "%" else f"{sd:.2g}"


def _difference(paired: Paired | None, index: int, reach: float, metric: Metric) -> Cell:
    if paired is None:
        return Cell(NOTHING)
    if paired.low is None or paired.high is None:
        return Cell(format_difference(metric, paired.difference), "(one pair)" if paired.pairs == 1 else "(every pair)")
    ends = (paired.low, paired.difference, paired.high)
    return Cell(
        format_difference(metric, paired.difference),
        f"[{format_difference(metric, paired.low)}, {format_difference(metric, paired.high)}]",
        figure=interval(ends, index, reach),
    )


def _p(paired: Paired | None) -> Cell:
    return Cell(format_p(paired.p_holm) if paired and paired.p_holm is not None else NOTHING)


def _rate(summary: Summary) -> Cell:
    text = f"{summary.lr:g}" if summary.lr is not None else NOTHING
    return Cell(text, alarm="edge of its grid" if summary.at_edge else "")


def _time(cost: Cost | None, reference: bool) -> Cell:
    if cost is None or cost.step_seconds is None:
        return Cell(NOTHING)
    own = format_seconds(cost.step_seconds)
    return Cell(own) if reference or cost.step_ratio is None else Cell(f"× {cost.step_ratio:.2f}", _spread(cost))


def _spread(cost: Cost) -> str:
    if cost.step_ratio_low is None or cost.step_ratio_high is None:
        return ""
    return f"[{cost.step_ratio_low:.2f}, {cost.step_ratio_high:.2f}]"


def _memory(cost: Cost | None, reference: bool) -> Cell:
    if cost is None or cost.memory_bytes is None:
        return Cell(NOTHING)
    return (
        Cell(format_bytes(cost.memory_bytes))
        if reference or cost.memory_ratio is None
        else Cell(f"× {cost.memory_ratio:.2f}")
    )
