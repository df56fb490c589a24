"""Draws the figures of README and of the cards from committed results, with the charts of the report.

python -m benchmarks.figures                    # all of them, to docs/images/NAME-light.svg and NAME-dark.svg
python -m benchmarks.figures accuracy batchless  # these alone

A figure whose results are not committed yet is named and left out.
"""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.studies import fine_tuning as fine_tuning_study
from benchmarks.studies.online import PHASES, WINDOWS
from benchmarks.studies.runs import best
from normkit.study.report.chart import COLOURS, Series, line_chart
from normkit.study.report.format import enumerate_words
from normkit.study.report.render import read_results
from normkit.study.report.scales import Axis, log_ticks, nice_ticks
from normkit.study.report.statistics import summarize

ROOT = Path(__file__).parents[1]
IMAGES, REPORTS = ROOT / "docs" / "images", ROOT / "docs" / "results"
STYLE = ROOT / "src/normkit/study/report/templates/report.css"
FINE_TUNING = ROOT / "benchmarks" / "results" / "fine_tuning.jsonl"
ONLINE = ROOT / "benchmarks" / "results" / "online.jsonl"
STREAMED = ("batch", "none", "bnp", "group+bnp", "group+ws")
CNN4 = (
    *(f"cifar10-cnn4{name}.json" for name in ("", "-four", "-two", "-single", "-eight", "-one", "-others", "-large")),
    "accumulation-whole.json",
)
"""One network, at several batch sizes; what several have is taken from the first."""
RESNET20 = ("cifar10-resnet20-large.json", "cifar10-resnet20-eight.json", "cifar10-resnet20.json")
SIZE = (760, 340)
INDICES = ("batch", "none", "group", "bnp", "group+bnp", "batch-renorm", "batchless-projected", "group+ws")
"""A method has the same colour and marker in every figure of a card."""

Points = dict[str, dict[float, list[float]]]
"""Method -> x -> values, one per seed or their mean alone."""


def studies(*files: str, methods: tuple[str, ...] = ()) -> str:
    """Accuracy against batch size, from several studies' ``results.json`` in docs/results; of all methods or of these.

    Lines connect runs of one length.
    """
    points: Points = defaultdict(dict)
    lengths: dict[int, list[int]] = defaultdict(list)
    for record in (read_results(REPORTS / file) for file in files):
        lengths[record.config["budget"]] += record.config["batch_sizes"]
        for summary in summarize(record):
            wanted = summary.scores and (not methods or summary.method in methods)
            if wanted and summary.batch_size not in points[summary.method]:
                points[summary.method][summary.batch_size] = [100 * score for score in summary.scores]
    parts = {budget: tuple(sorted({*sizes}, reverse=True)) for budget, sizes in lengths.items()}
    runs = [f"{budget:,} at {enumerate_words([*map(str, sizes)])}" for budget, sizes in parts.items()]
    note = f"; samples a run: {', '.join(runs)}" if len(runs) > 1 else ""
    return by_size(points, "test accuracy, %", note=note, parts=tuple(parts.values()))


def reports(files: tuple[str, ...], methods: tuple[str, ...]) -> str:
    """Accuracy against batch size, from the tables of reports in docs/results: of `compare`, or of `reproduce`."""
    points: Points = defaultdict(dict)
    for text in ((REPORTS / file).read_text() for file in files):
        for size, table in re.findall(r"^## Batch size (\d+)$(.*?)(?=^## |\Z)", text, re.M | re.S):
            for method, accuracy in re.findall(r"^\| `([^`]+)` \| ([\d.]+) %", table, re.M):
                points[method][int(size)] = [float(accuracy)]
        for method, size, accuracy in re.findall(r"^\| \S+ \| (\S+) \| (\d+) \| ([\d.]+) ±", text, re.M):
            points[method][int(size)] = [float(accuracy)]
    return by_size({method: points[method] for method in methods}, "test accuracy, %")


def fine_tuning(target: str) -> str:
    """Accuracy of a trained network after fine-tuning, from the runs of ``benchmarks/studies/fine_tuning.py``."""
    runs = defaultdict(list)
    for line in FINE_TUNING.read_text().splitlines():
        run = json.loads(line)
        if run["target"] == target and run["method"] != "fold+none":  # a control, close to frozen: in the table alone
            runs[run["method"], run["batch_size"]].append(run)
    points: Points = defaultdict(dict)
    for (method, size), found in runs.items():
        lr = best({run["lr"]: run for run in found if run["seed"] == 0}, fine_tuning_study.score)
        points[method][size] = [run["best"] for run in found if run["lr"] == lr]
    before = mean(run["start"] for (method, _), found in runs.items() if method == "batch" for run in found)
    return by_size(points, "test accuracy after fine-tuning, %", (before, "before"))


def online() -> str:
    """Accuracy in each window of the stream, from the runs of ``benchmarks/studies/online.py``; ticks at the shifts."""
    runs = defaultdict(list)
    for line in ONLINE.read_text().splitlines():
        run = json.loads(line)
        if run["seed"] > 0 and run["method"] in STREAMED:  # that of the search chose the rate
            runs[run["method"]].append(run)
    images = runs[STREAMED[0]][0]["images"]
    points: Points = {
        method: {
            images * place // WINDOWS: [mean(window)]
            for place, window in enumerate(zip(*(run["windows"] for run in runs[method]), strict=True), start=1)
        }
        for method in STREAMED
    }
    x = Axis("images", 0, images, tuple(images * phase // PHASES for phase in range(PHASES + 1)), "{:,.0f}".format)
    values = [value for found in points.values() for (value,) in found.values()]
    ticks = nice_ticks(min(values), max(values))
    return lines(points, x, Axis("accuracy in the last window, %", ticks[0], ticks[-1], ticks), markers=False)


def by_size(
    points: Points,
    title: str,
    mark: tuple[float, str] | None = None,
    note: str = "",
    parts: tuple[tuple[float, ...], ...] = (),
) -> str:
    """A score against batch size, small to the right; each of ``parts``, which are sizes, has a line of its own."""
    sizes = sorted({size for values in points.values() for size in values}, reverse=True)
    x = Axis(f"batch size (log scale, small to the right{note})", sizes[0], sizes[-1], tuple(sizes), scale=math.log2)
    values = [v for scores in points.values() for found in scores.values() for v in found]
    ticks = nice_ticks(min(values), max(values))
    shown = mark if mark and ticks[0] < mark[0] < ticks[-1] else None
    return lines(points, x, Axis(title, ticks[0], ticks[-1], ticks, mark=shown), parts=parts)


def beta(file: str) -> str:
    """Effective beta-smoothness over the steps, from a ``landscape.json`` in docs/results."""
    traces = json.loads((REPORTS / file).read_text())["traces"]
    points: Points = {
        trace["method"]: {r["step"]: [r["landscape"]["beta"]] for r in trace["records"] if r["landscape"]["beta"]}
        for trace in traces
        if not trace["diverged"]
    }
    ticks = nice_ticks(0, max(step for steps in points.values() for step in steps), 4)
    x = Axis("step", 0, ticks[-1], ticks, "{:,.0f}".format)
    return lines(points, x, log_axis("effective beta-smoothness (log scale)", points), markers=False)


def condition_numbers() -> str:
    """Condition number of each layer before and after preconditioning, from bnp_conditioning.json."""
    layers = json.loads((ROOT / "benchmarks/results/bnp_conditioning.json").read_text())["result"]["layers"]
    names = [f"{place}. convolution" for place in range(1, 5)] + ["classifier", "loss Hessian"]
    points: Points = {
        label: {place: [layer[when]] for place, layer in enumerate(layers.values())}
        for label, when in (("plain", "before"), ("preconditioned", "after"))
    }
    x = Axis("layer", 0, len(names) - 1, tuple(range(len(names))), lambda place: names[int(place)])
    return lines(points, x, log_axis("condition number (log scale)", points))


def sampled() -> str:
    """Share of the posterior's variance that Langevin sampling has reached, from langevin.json."""
    result = json.loads((ROOT / "benchmarks/results/langevin.json").read_text())["result"]
    points: Points = {
        name: {int(step): [100 * share] for step, share in found.items()} for name, found in result.items()
    }
    steps = tuple(points["plain"])
    x = Axis("step (log scale)", steps[0], steps[-1], steps, "{:,.0f}".format, scale=math.log10)
    ticks = (0, 25, 50, 75, 100)
    return lines(points, x, Axis("smallest share of the posterior variance, %", 0, 110, ticks))


def log_axis(title: str, points: Points) -> Axis:
    """A logarithmic axis for all values."""
    values = [v for found in points.values() for seeds in found.values() for v in seeds]
    return Axis(title, min(values), max(values), log_ticks(min(values), max(values)), "{:.0e}".format, scale=math.log10)


def lines(points: Points, x: Axis, y: Axis, *, markers: bool = True, parts: tuple[tuple[float, ...], ...] = ()) -> str:
    """One line per method through the means, or one through each of ``parts``, with a dot per seed."""
    indices = {method: INDICES.index(method) for method in points if method in INDICES}
    free = (index for index in reversed(range(COLOURS)) if index not in indices.values())
    indices |= {method: next(free) for method in points if method not in INDICES}
    backwards = x.low > x.high  # lines are labelled at their last point
    place = {at: number for number, part in enumerate(parts) for at in part}

    def order(at: float) -> tuple[int, float]:
        return place.get(at, 0), -at if backwards else at

    series = [
        Series(
            method,
            indices[method],
            points=tuple((at, mean(found[at])) for at in sorted(found, key=order)),
            dots=tuple((at, value) for at, values in found.items() for value in values if len(values) > 1),
            markers=markers,
            starts=tuple(next((at for at in part if at in found), part[0]) for part in parts),
        )
        for method, found in points.items()
    ]
    ends = [f"{s.label}: {', '.join(f'{value:.4g} at {x.show(at)}' for at, value in s.points)}" for s in series]
    return str(line_chart(series, x, y, size=SIZE, alt=f"{y.title} against {x.title}. {'. '.join(ends)}."))


def standalone(chart: str, dark: bool) -> str:
    """A chart as a file of its own, with the colours of the report's style sheet."""
    css = STYLE.read_text(encoding="utf-8")
    colours = re.findall(r":root \{.*?\}", css, re.DOTALL)[dark]
    shapes = css[css.index(".c0 {") : css.index(".scroll {")]
    style = f"<style>\n{colours}\nsvg {{ font-family: system-ui, sans-serif; }}\n{shapes}</style>"
    head, rest = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


FIGURES: dict[str, Callable[[], str]] = {
    "accuracy": lambda: studies(*CNN4, methods=("batch", "group+ws", "group+bnp", "bnp", "instance", "group")),
    "baselines": lambda: studies(
        *CNN4,
        methods=("batch", "group", "group+ws", "instance", "batch-renorm", "none", "normalizer-free", "online"),
    ),
    "residual": lambda: studies(*RESNET20, methods=("batch", "group+ws", "group+bnp", "sgd-g", "bnp", "group")),
    "revisited": lambda: studies("cifar10-cnn4-others.json", methods=("batch", "revisited")),
    "filter-response": lambda: studies("cifar10-cnn4-others.json", methods=("batch", "group+ws", "filter-response")),
    "riemannian": lambda: studies("cifar10-cnn4.json", methods=("batch", "sgd-g", "group")),
    "fine-tuning": lambda: fine_tuning("colours"),
    "fine-tuning-classes": lambda: fine_tuning("classes"),
    "online": online,
    "bnp-convergence": condition_numbers,
    "bnp-langevin": sampled,
    "batchless": lambda: reports(("batchless-spiral.md",), ("batch", "none", "batch-renorm", "batchless-adam")),
    "how-bn-helps": lambda: beta("how-bn-helps-dln/landscape.json"),
}


def main(names: list[str]) -> None:
    """Draw these figures, or all."""
    for name in names or FIGURES:
        try:
            chart = FIGURES[name]()
        except FileNotFoundError as missing:
            print(f"{name}: no {Path(missing.filename).relative_to(ROOT)} yet")
            continue
        for theme, dark in (("light", False), ("dark", True)):
            (IMAGES / f"{name}-{theme}.svg").write_text(standalone(chart, dark), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
