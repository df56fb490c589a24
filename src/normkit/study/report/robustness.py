"""What an untuned learning rate costs: the search runs one grid point, a factor sqrt(10), off each method's best rate."""

from collections.abc import Sequence

import numpy as np

from normkit.study.records import StudyRecord
from normkit.study.report.chart import swatch
from normkit.study.report.figures import series_index
from normkit.study.report.format import difference_unit, format_difference
from normkit.study.report.rates import grids, neighbour_change
from normkit.study.report.statistics import Summary, plan_axes
from normkit.study.report.tables import NOTHING, Cell, Row, Table


def robustness(record: StudyRecord, summaries: Sequence[Summary]) -> Table | None:
    """One row per method: change of the validation score at the next lower and higher rate, per batch size and in the mean.

    Args:
        record: A study, finished or not.
        summaries: Its summaries.

    Returns:
        The table, the most robust method first; None where no rate has a neighbour, as with given rates.
    """
    chosen, tried, metric = {(s.method, s.batch_size): s.lr for s in summaries}, grids(record), record.metric
    methods, sizes = plan_axes(record)
    index, reference = series_index(record), record.config["reference"]
    found = []
    for method in methods:
        sides = [
            [neighbour_change(tried.get((method, size), ()), chosen.get((method, size)), step) for step in (-1, 1)]
            for size in sizes
        ]
        changes = [change for pair in sides for change in pair if isinstance(change, float)]
        lost = [change for pair in sides for change in pair if isinstance(change, str)]
        mean = float(np.mean(changes)) if changes else None
        cells = [_cell([_text(change, record) for change in pair]) for pair in sides]
        alarm = f"{' or '.join(dict.fromkeys(lost))} {len(lost)} of {len(lost) + len(changes)}" if lost else ""
        cells.append(Cell(NOTHING if mean is None else format_difference(metric, mean), alarm=alarm))
        if changes or lost:
            row = Row(method, "", method == reference, swatch(index[method]), tuple(cells))
            found.append((len(lost), -metric.signed(mean or 0.0), row))
    if not found:
        return None
    heads = [(f"batch size {size}", "lower, higher rate") for size in sizes]
    rows = [row for *_, row in sorted(found, key=lambda ranked: ranked[:2])]
    return Table("One grid point off the best rate", (*heads, ("mean change", difference_unit(metric))), tuple(rows))


def _text(change: float | str | None, record: StudyRecord) -> str:
    if change is None:
        return NOTHING
    return change if isinstance(change, str) else format_difference(record.metric, change)


def _cell(sides: Sequence[str]) -> Cell:
    return Cell(NOTHING if set(sides) == {NOTHING} else ", ".join(sides))
