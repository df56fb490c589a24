"""Equal time beside equal examples: the validation score of the final runs over the time that their training took.

A method with cheaper steps sees more examples in the same time. Every run has the same number of examples, so the comparison
at equal time reads each method off its curve where the reference ends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normkit.study.records import StudyRecord, TrialResult
from normkit.study.report.chart import Series, line_chart, swatch
from normkit.study.report.figures import PANEL, Panel, score_axis, series_index
from normkit.study.report.format import format_number, format_score, quoted
from normkit.study.report.scales import Axis, nice_ticks
from normkit.study.report.statistics import plan_axes
from normkit.study.report.tables import NOTHING, Cell, Row, Table

_UNITS = ((3 * 3600, 3600, "h"), (3 * 60, 60, "min"), (0, 1, "s"))  # from which end on, seconds, name


@dataclass(frozen=True)
class TimedCurve:
    """Validation score over training time of one method at one batch size.

    Attributes:
        seconds: Training time at each point, validation not counted; at the last point, that of the whole budget.
        scores: Mean validation score over the seeds at each point.
    """

    seconds: tuple[float, ...]
    scores: tuple[float, ...]

    def at(self, seconds: float) -> float | None:
        """The score at a time, linear between points: the last one after the end, None before the first.

        Examples:
            >>> curve = TimedCurve((10.0, 20.0), (0.5, 0.7))
            >>> curve.at(15.0), curve.at(30.0), curve.at(5.0)
            (0.6, 0.7, None)
        """
        return None if seconds < self.seconds[0] else float(np.interp(seconds, self.seconds, self.scores))


def timed_curves(record: StudyRecord) -> dict[tuple[str, int], TimedCurve]:
    """The curves of all methods whose final runs were validated on the way; runs with an end point alone have none.

    Args:
        record: A study, finished or not.
    """
    runs, curves = _finished(record), {}
    means = {cell: mean for cell, trials in runs.items() if len(mean := _mean_curve(trials)) > 1}
    measured = _measured(record)
    for cell, mean in means.items():
        per_step = measured.get(cell) if measured else _wall_time(runs[cell])
        if per_step:
            seconds = tuple(per_step * math.ceil(examples / cell[1]) for examples, _ in mean)
            curves[cell] = TimedCurve(seconds, tuple(score for _, score in mean))
    return curves


def _finished(record: StudyRecord) -> dict[tuple[str, int], list[TrialResult]]:
    runs: dict[tuple[str, int], list[TrialResult]] = {}
    for trial in record.trials:
        if trial.key.phase == "final" and trial.state == "finished":
            runs.setdefault((trial.key.method, trial.key.batch_size), []).append(trial)
    return runs


def _measured(record: StudyRecord) -> dict[tuple[str, int], float]:
    """Measured seconds per step; empty unless every method that finished has them, so that all share one clock."""
    steps = {(cost.method, cost.batch_size): cost.step_seconds for cost in record.costs}
    known = {cell: seconds for cell, seconds in steps.items() if seconds}
    return known if _finished(record).keys() <= known.keys() else {}


def _mean_curve(trials: Sequence[TrialResult]) -> list[tuple[int, float]]:
    """(examples, mean validation score) at each number of examples at which all runs were validated."""
    scored = [{p.examples: p.validation_score for p in t.curve if p.validation_score is not None} for t in trials]
    shared = sorted(set.intersection(*map(set, scored)))
    return [(examples, float(np.mean([scores[examples] for scores in scored]))) for examples in shared]


def _wall_time(trials: Sequence[TrialResult]) -> float:
    """Mean wall time per step without validation; 0 where it is not known."""
    known = [
        (t.seconds - t.validation_seconds) / math.ceil(t.curve[-1].examples / t.key.batch_size)
        for t in trials
        if t.seconds > 0
    ]
    return float(np.mean(known)) if known else 0.0


def over_time(record: StudyRecord) -> list[Panel]:
    """Validation score of the final runs over training time, one panel per batch size."""
    curves, metric, panels = timed_curves(record), record.metric, []
    for size in plan_axes(record)[1]:
        here = [(m, k, curves[m, size]) for m, k in series_index(record).items() if (m, size) in curves]
        if not here:
            continue
        end = max(curve.seconds[-1] for *_, curve in here)
        second, unit = next((seconds, name) for least, seconds, name in _UNITS if end >= least)
        series = [
            Series(method, index, tuple(zip((t / second for t in curve.seconds), curve.scores, strict=True)))
            for method, index, curve in here
        ]
        ticks = tuple(tick for tick in nice_ticks(0.0, end / second, 4) if tick <= end / second)
        x = Axis(f"training time, {unit}", 0.0, end / second, ticks)
        y = score_axis("validation", metric, [score for *_, curve in here for score in curve.scores])
        ends = [
            f"{method} ends at {format_score(metric, curve.scores[-1])} after {curve.seconds[-1] / second:.3g} {unit}"
            for method, _, curve in here
        ]
        alt = f"Validation {metric.name} against training time at batch size {size}. {', '.join(ends)}."
        panels.append(Panel(f"Batch size {size}", line_chart(series, x, y, size=PANEL, alt=alt)))
    return panels


def at_equal_time(record: StudyRecord) -> Table | None:
    """The validation score of each method at the time that the reference needs for its whole budget.

    Args:
        record: A study, finished or not.

    Returns:
        One row per method, one column per batch size; None where fewer than two methods can be compared.
    """
    curves, reference = timed_curves(record), record.config["reference"]
    methods, sizes = plan_axes(record)
    sizes = [size for size in sizes if (reference, size) in curves]
    index = series_index(record)
    shown = [method for method in methods if any((method, size) in curves for size in sizes)]
    if len(shown) < 2:
        return None
    rows = [
        Row(
            method,
            "",
            method == reference,
            swatch(index[method]),
            tuple(_cell(record, curves.get((method, size)), curves[reference, size].seconds[-1]) for size in sizes),
        )
        for method in shown
    ]
    unit = "equal time (equal examples)"
    return Table("At equal time", tuple((f"batch size {size}", unit) for size in sizes), tuple(rows))


def _cell(record: StudyRecord, curve: TimedCurve | None, seconds: float) -> Cell:
    metric = record.metric
    if curve is None:
        return Cell(NOTHING)
    score, share = curve.at(seconds), seconds / curve.seconds[-1]
    text = NOTHING if score is None else format_score(metric, score)
    note = f"({format_number(metric, curve.scores[-1])})"
    if share < 1:
        return Cell(text, f"{note} after {100 * share:.0f} % of the examples")
    return Cell(text, note if share == 1 else f"{note} in {100 / share:.0f} % of the time")


def equal_time_note(record: StudyRecord) -> str:
    """Explain how the time was measured and what the table reads off.

    Args:
        record: A study, finished or not.
    """
    metric, reference = record.metric, quoted(record.config["reference"])
    clock = "the measured time per step" if _measured(record) else "the wall time of the runs without their validation"
    text = (
        f"Validation {metric.name} of the final runs, means over seeds; the time is {clock}. The table reads each curve at the "
        f"time in which {reference} sees all its examples; the method's own end, at equal examples, is in brackets."
    )
    if record.config.get("schedule") == "constant":
        return text
    return (
        f"{text} The learning rate falls over all examples of a run, so a slower method is read off before its schedule has "
        "ended: a run planned for that time would end better."
    )
