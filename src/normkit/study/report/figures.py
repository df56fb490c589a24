"""The figures of a report: score against batch size, training curves, score against learning rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from normkit.study.records import Metric, StudyRecord, TrialResult
from normkit.study.report.chart import Series, line_chart
from normkit.study.report.format import format_score, in_unit
from normkit.study.report.rates import grids
from normkit.study.report.scales import Axis, log_ticks, nice_ticks
from normkit.study.report.statistics import Summary, finite, plan_axes

WIDE, NARROW, PANEL = (1000, 420), (370, 340), (360, 260)
_LOSS_HEADROOM = (
    1.5  # losses above 1.5 times that of guessing (or of the first point) are cut off: they would hide the rest
)


@dataclass(frozen=True)
class Panel:
    """One chart of a row of small multiples."""

    title: str
    chart: Markup


def series_index(record: StudyRecord) -> dict[str, int]:
    """Colour and marker of each method; 0 is the reference's."""
    methods, _ = plan_axes(record)
    others = [method for method in methods if method != record.config["reference"]]
    return {record.config["reference"]: 0, **{method: 1 + k for k, method in enumerate(others)}}


def by_batch_size(record: StudyRecord, summaries: Sequence[Summary]) -> list[Markup]:
    """Test score against batch size, one line per method, for wide and for narrow screens.

    Empty before final runs of two batch sizes have ended: the tables show a single one better.
    """
    summaries = [s for s in summaries if s.scores or s.diverged or s.failed]
    if len({s.batch_size for s in summaries}) < 2:
        return []
    series, texts, metric = [], [], record.metric
    for method, index in series_index(record).items():
        mine = sorted((s for s in summaries if s.method == method), key=lambda s: -s.batch_size)
        if not mine:
            continue
        series.append(
            Series(
                method,
                index,
                points=tuple((s.batch_size, s.mean) for s in mine if s.mean is not None),
                dots=tuple((s.batch_size, score) for s in mine for score in s.scores),
                crosses=tuple(s.batch_size for s in mine if s.diverged or s.failed),
            )
        )
        means = [format_score(metric, s.mean) if s.mean is not None else f"no {metric.name}" for s in mine]
        words = [f"{mean} at {s.batch_size}" for mean, s in zip(means, mine, strict=True)]
        texts.append(f"{method}: {', '.join(words)}")
    sizes = sorted({s.batch_size for s in summaries}, reverse=True)
    x = Axis("batch size (log scale, small to the right)", sizes[0], sizes[-1], tuple(sizes), scale=math.log2)
    y = score_axis("test", metric, [value for s in series for _, value in (*s.points, *s.dots)])
    chance = record.config["chance"]
    if chance is not None and y.low < chance < y.high:
        y = replace(y, mark=(chance, "chance"))
    alt = f"Test {metric.name} against batch size. {'. '.join(texts)}."
    return [line_chart(series, x, y, size=size, alt=alt, css=css) for size, css in ((WIDE, "wide"), (NARROW, "narrow"))]


def training_curves(record: StudyRecord) -> list[Panel]:
    """Training loss of the final runs: mean over seeds, band from lowest to highest.

    One panel per batch size, all with the same axes.
    """
    by_size = {size: lines for size in plan_axes(record)[1] if (lines := _loss_lines(record, size))}
    if not by_size:
        return []
    everything = [line for lines in by_size.values() for line in lines]
    losses = [loss for line in everything for _, low, high in line.band for loss in (low, high)] or [0.0, 1.0]
    start = record.config["chance_loss"] or max((line.points[0][1] for line in everything if line.points), default=1.0)
    shown_top = max([_LOSS_HEADROOM * start, *(line.points[-1][1] for line in everything if line.points)])
    ticks = nice_ticks(min(0.0, *losses), min(max(losses), shown_top), 4)
    y = Axis("training loss, nats" if record.config["chance_loss"] else "training loss", ticks[0], ticks[-1], ticks)
    end = max([record.config["budget"], *(at for line in everything for at, _ in line.points)])
    shown = tuple(tick for tick in nice_ticks(0, end, 4) if tick <= end)
    x = Axis("training examples seen", 0, end, shown, "{:,.0f}".format)
    panels = []
    for size, lines in by_size.items():
        ends = [f"{s.label} {f'ends at {s.points[-1][1]:.2f}' if s.points else 'diverged'}" for s in lines]
        alt = f"Training loss against examples seen at batch size {size}. {', '.join(ends)}."
        panels.append(Panel(f"Batch size {size}", line_chart(lines, x, y, size=PANEL, alt=alt)))
    return panels


def _loss_lines(record: StudyRecord, size: int) -> list[Series]:
    lines = []
    for method, index in series_index(record).items():
        trials = _of(record, "final", method, size)
        band = _band([t for t in trials if t.state == "finished"])
        crosses = tuple(t.curve[-1].examples if t.curve else 0 for t in trials if t.state == "diverged")
        if band or crosses:
            points = tuple((at, mean) for at, mean, _, _ in band)
            edges = tuple((at, low, high) for at, _, low, high in band)
            lines.append(Series(method, index, points, edges, crosses=crosses, markers=False))
    return lines


def by_learning_rate(record: StudyRecord, summaries: Sequence[Summary]) -> list[Panel]:
    """Validation score of the search runs against learning rate, per batch size; the chosen rate is ringed."""
    chosen = {(s.method, s.batch_size): s.lr for s in summaries}
    return _rate_panels(record, "learning rate (log scale)", lambda cell: 1.0, chosen)


def by_rate_factor(record: StudyRecord, summaries: Sequence[Summary]) -> list[Panel]:
    """Validation score of the search runs against the multiple of each method's own chosen rate, per batch size."""
    chosen = {(s.method, s.batch_size): s.lr for s in summaries}
    return _rate_panels(record, "multiple of the best rate (log scale)", chosen.get, {})


def _rate_panels(
    record: StudyRecord,
    title: str,
    unit: Callable[[tuple[str, int]], float | None],
    ringed: Mapping[tuple[str, int], float | None],
) -> list[Panel]:
    """Validation score against learning rate in units of its own for each method and batch size; no line without a unit."""
    metric, tried = record.metric, grids(record)
    panels = []
    for size in plan_axes(record)[1]:
        series = []
        for method, index in series_index(record).items():
            one = unit((method, size))
            grid = tried.get((method, size), ()) if one else ()
            points = tuple((rate.lr / (one or 1.0), rate.score) for rate in grid if rate.score is not None)
            crosses = tuple(rate.lr / (one or 1.0) for rate in grid if "diverged" in rate.lost)
            if points or crosses:
                series.append(Series(method, index, points, crosses=crosses, ring=ringed.get((method, size))))
        rates = [value for s in series for value in (*(lr for lr, _ in s.points), *s.crosses)]
        if not rates:
            continue
        x = Axis(title, min(rates), max(rates), log_ticks(min(rates), max(rates)), scale=math.log10)
        y = score_axis("validation", metric, [value for s in series for _, value in s.points])
        tops = [(s.label, *max(s.points, key=lambda point: metric.signed(point[1]))) for s in series if s.points]
        texts = [f"{method} is best at {lr:g} with {format_score(metric, score)}" for method, lr, score in tops]
        alt = f"Validation {metric.name} against {title.partition(' (')[0]} at batch size {size}. {', '.join(texts)}."
        panels.append(Panel(f"Batch size {size}", line_chart(series, x, y, size=PANEL, alt=alt)))
    return panels


def _of(record: StudyRecord, phase: str, method: str, size: int) -> list[TrialResult]:
    wanted = (phase, method, size)
    return [t for t in record.trials if (t.key.phase, t.key.method, t.key.batch_size) == wanted]


def _band(trials: Sequence[TrialResult]) -> list[tuple[float, float, float, float]]:
    """(examples, mean, lowest, highest loss) at each number of examples that every run has."""
    losses = [{point.examples: point.train_loss for point in trial.curve} for trial in trials]
    shared = sorted(set.intersection(*(set(loss) for loss in losses))) if losses else []
    rows = [(at, finite(loss[at] for loss in losses)) for at in shared]
    return [(at, float(np.mean(values)), min(values), max(values)) for at, values in rows if values]


def score_axis(split: str, metric: Metric, values: Sequence[float]) -> Axis:
    """The axis of a score, which covers the values.

    Args:
        split: What the score is of: ``validation`` or ``test``.
        metric: What it measures.
        values: The scores to be drawn.
    """
    ticks = nice_ticks(min(values, default=0.0), max(values, default=1.0))
    better = "" if metric.higher_is_better else " (lower is better)"
    title = f"{split} {metric.name}{in_unit(metric.unit)}{better}"
    if metric.unit != "%":
        return Axis(title, ticks[0], ticks[-1], ticks)
    if max(values, default=0.0) <= 1.0:  # an error rate may be larger
        ticks = tuple(tick for tick in ticks if tick <= 1.0 + 1e-9)
    return Axis(title, ticks[0], max(ticks[-1], *values, ticks[0] + 0.01), ticks, lambda value: f"{100 * value:g}")
