"""The figures and tables of the landscape: one page, Markdown, JSON."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from normkit.instruments.result import plain
from normkit.study.files import write_file
from normkit.study.landscape.records import LandscapeRecord, Trace
from normkit.study.records import Metric
from normkit.study.report.chart import Series, line_chart
from normkit.study.report.figures import PANEL, Panel
from normkit.study.report.format import format_score
from normkit.study.report.page import render_template
from normkit.study.report.scales import Axis, log_ticks, nice_ticks


def write_landscape(record: LandscapeRecord, folder: Path) -> list[Path]:
    """Write ``landscape.html``, ``landscape.md`` and ``landscape.json``.

    Args:
        record: What was measured.
        folder: Where to write; made if it is not there.

    Returns:
        The files, in the order above.
    """
    values: dict[str, Any] = {
        "record": record,
        "rows": table(record.traces, record.metric),
        "columns": columns(record.metric),
    }
    values["sections"] = sections(record.traces)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "landscape.html": render_template("landscape.html.j2", **values),
        "landscape.md": render_template("landscape.md.j2", **values),
        "landscape.json": json.dumps(plain(record.to_dict()), indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_file(folder / name, text)
    return [folder / name for name in texts]


COLUMNS = (  # behind the training loss and the score at the end
    "width of the loss band",
    "largest gradient change",
    "beta",
    "beta, first third",
    "covariate shift |G - G'|/|G|",
    "cos(G, G')",
    "change of activation means per step",
    "since the start",
    "change of variances per step",
)


def columns(metric: Metric) -> list[str]:
    """Heads of the table's columns."""
    return ["training loss at the end", f"test {metric.name}", *COLUMNS]


def table(traces: Iterable[Trace], metric: Metric) -> list[tuple[str, list[str]]]:
    """Per method: name and the cells of ``columns``, medians over the measured steps (and layers)."""
    rows = []
    for trace in traces:
        facts = figures_of(trace)
        cells = [
            "diverged" if trace.diverged else f"{trace.losses[-1][1]:.3g}",
            "" if trace.score is None else format_score(metric, trace.score),
        ]
        rows.append((trace.method, cells + ["" if v is None else f"{v:.3g}" for v in facts.values()]))
    return rows


def figures_of(trace: Trace) -> dict[str, float | None]:
    """The medians over the measured steps and the layers looked at, in the order of the table's columns."""
    walks = [record["landscape"] for record in trace.records]
    shifts = [value for _, layers in trace.shifts for value in layers.values()]
    drifts = [value for _, layers in trace.drifts for value in layers.values()]
    return {
        "band": middle(w["loss_high"] - w["loss_low"] for w in walks),
        "change": middle(w["change_high"] for w in walks),
        "beta": middle(w["beta"] for w in walks),
        "early_beta": middle(w["beta"] for w in walks[: math.ceil(len(walks) / 3)]),
        "shift": middle(relative for relative, _ in shifts),
        "cosine": middle(cosine for _, cosine in shifts),
        "drift": middle(value[0] for value in drifts),
        "total_drift": middle(value[2] for value in drifts),
        "variance_drift": middle(value[1] for value in drifts),
    }


def middle(values: Iterable[float]) -> float | None:
    """Median, infinity where most are not finite, or None where there are none."""
    known = [value if _finite(value) else math.inf for value in values]
    return median(known) if known else None


def sections(traces: Sequence[Trace]) -> list[tuple[str, str, list[Panel]]]:
    """Title, explanation and charts of each part of the page."""

    def walk(name: str) -> Callable[[Trace], list[tuple[int, float]]]:
        return lambda t: [(r["step"], r["landscape"][name]) for r in t.records]

    def edges(low: str, high: str) -> Callable[[Trace], list[tuple[int, float, float]]]:
        return lambda t: [(r["step"], r["landscape"][low], r["landscape"][high]) for r in t.records]

    smooth = [
        chart(traces, "Loss along the gradient", "loss", walk("loss_low"), edges("loss_low", "loss_high")),
        chart(
            traces,
            "Gradient predictiveness",
            "change of the gradient",
            walk("change_high"),
            edges("change_low", "change_high"),
        ),
        chart(traces, "Effective beta-smoothness", "beta", walk("beta")),
        chart(traces, "Training loss", "loss", lambda t: list(t.losses)),
    ]
    found = [
        (
            "The landscape along the gradient",
            "At each measured step the weights are moved along the gradient of the training batch: the band spans the "
            "smallest and largest value over the step sizes. Lines are the lower edge of the loss, the upper edge of the "
            "gradient's change, and beta, the largest change per distance. Logarithmic axes.",
            smooth,
        )
    ]
    shift = [
        chart(traces, f"{title}, {layer}", title, lambda t, n=number, p=layer: _of(t.shifts, p, n))
        for number, title in enumerate(("|G - G'| / |G|", "cos(G, G')"))
        for layer in _layers(t.shifts for t in traces)
    ]
    found.append((
        "Internal covariate shift",
        "How a layer's gradient changes when the layers before it make their update of this step.",
        shift,
    ))
    drift = [
        chart(traces, f"{title}, {layer}", title, lambda t, n=number, p=layer: _of(t.drifts, p, n))
        for number, title in ((0, "change of means"), (1, "change of variances"), (2, "drift of means"))
        for layer in _layers(t.drifts for t in traces)
    ]
    found.append((
        "Stability of the activations",
        "Mean over channels of the change of the output's mean and variance by one step, and since the first step, at "
        "the place of a normalization layer.",
        drift,
    ))
    return [(title, text, [panel for panel in panels if panel]) for title, text, panels in found]


def _finite(value: float | None) -> bool:
    """Return whether a number can be drawn; JSON turns a number that is not finite into None."""
    return value is not None and math.isfinite(value)


def _layers(of_traces: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(layer for steps in of_traces for _, layers in steps for layer in layers))


def _of(steps: Any, layer: str, number: int) -> list[tuple[int, float]]:
    return [(step, layers[layer][number]) for step, layers in steps if layer in layers]


def chart(
    traces: Sequence[Trace],
    title: str,
    unit: str,
    line: Callable[[Trace], list[tuple[int, float]]],
    band: Callable[[Trace], list[tuple[int, float, float]]] = lambda _: [],
) -> Panel | None:
    """One line, and perhaps a band, per method over the steps; logarithmic where all values are positive."""
    series = []
    for index, trace in enumerate(traces):
        points = tuple((x, y) for x, y in line(trace) if _finite(y))
        edges = tuple(edge for edge in band(trace) if all(map(_finite, edge)))
        if points:
            series.append(Series(trace.method, index, points, edges, markers=False))
    lost = {trace.method for trace in traces if trace.diverged}
    shown = [s for s in series if s.label not in lost] or series  # what diverges must not take the whole axis
    values = [y for s in shown for y in (*(y for _, y in s.points), *(y for _, *e in s.band for y in e))]
    if not values:
        return None
    steps = [x for s in series for x, _ in s.points]
    ticks = tuple(tick for tick in nice_ticks(0, max(steps), 4) if tick <= max(steps))
    x = Axis("step", 0, max(*steps, 1), ticks, "{:,.0f}".format)
    low, high = min(values), max(values)
    if low > 0 and high > 3 * low:
        # a few points that are all but zero must not take the whole axis
        low = max(low, sorted(values)[len(values) // 50], high * 1e-6)
        y = Axis(unit, low, high, log_ticks(low, high), scale=lambda v: math.log10(max(v, 1e-300)))
    else:
        marks = nice_ticks(low, high, 4)
        y = Axis(unit, marks[0], marks[-1], marks)
    ends = [f"{s.label} ends at {s.points[-1][1]:.3g}" for s in series]
    return Panel(title, line_chart(series, x, y, size=PANEL, alt=f"{title} over steps. {', '.join(ends)}."))
