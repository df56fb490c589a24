"""The report of a study on a terminal: the tables, and below them the verdict, where the eye is at the end."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from normkit.study.records import StudyRecord
from normkit.study.report.format import pluralize
from normkit.study.report.statistics import summarize
from normkit.study.report.tables import Cell, Table, failed_runs, tables
from normkit.study.report.verdict import reach_verdict

# beginnings of the titles of columns that are left out, in this order, where there is no room
_LEFT_OUT = ("train/eval gap", "learning rate", "p", "against", "within", "memory", "time")
_NO_LIMIT = 1000


def render_terminal(record: StudyRecord) -> RenderableType:
    """The tables and the verdict; columns that the terminal has no room for are in the report's files only.

    Args:
        record: A study, finished or not.
    """
    summaries = summarize(record)
    verdict = reach_verdict(record, summaries)
    lost = (
        f"{pluralize(r.runs, f'{r.phase} run')} of `{r.method}` at batch size {r.batch_size} {r.what}"
        for r in failed_runs(record)
        if r.what.startswith("failed: ")
    )
    words = [_names(verdict.sentence, "bold"), *(_names(text, "dim") for text in (*verdict.caveats, *lost))]
    return Group(*map(_Fitted, tables(record, summaries)), *words)


@dataclass(frozen=True)
class _Fitted:
    """A table with as many of its columns as fit, above all score, difference, time and memory."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        wide = options.update(max_width=_NO_LIMIT)
        yield Text(self.table.title, style="bold")
        table = self._set((), quartiles=True)
        for count in range(len(_LEFT_OUT) + 1):
            if Measurement.get(console, wide, table).maximum <= options.max_width:
                break
            table = self._set(_LEFT_OUT[:count], quartiles=False)
        yield table

    def _set(self, left_out: tuple[str, ...], *, quartiles: bool) -> RichTable:
        kept = [k for k, (title, _) in enumerate(self.table.columns) if not title.startswith(left_out)]
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
        shown.add_column("method", overflow="ellipsis")
        for k in kept:
            shown.add_column(Text(self.table.columns[k][0]), justify="right", no_wrap=True)
        for row in self.table.rows:
            cells = [
                cell if quartiles or self.table.columns[k][0] != "time" else replace(cell, note="")
                for k, cell in enumerate(row.cells)
            ]
            name = Text(row.method, style="bold" if row.reference else "")
            if row.note:
                name.append(f"\n{row.note}", style="dim")
            shown.add_row(name, *(_cell(cells[k]) for k in kept))
        return shown


def _cell(cell: Cell) -> Text:
    text = Text(cell.text)
    if cell.note:
        text.append(f" {cell.note}", style="dim")
    if cell.alarm:
        text.append(f"\n{cell.alarm}", style="yellow")
    return text


def _names(sentence: str, style: str) -> Text:
    """A sentence with its names, which stand in backticks, set off by colour."""
    pieces = enumerate(sentence.split("`"))
    return Text.assemble(*((piece, "cyan" if k % 2 else "") for k, piece in pieces), style=style)
