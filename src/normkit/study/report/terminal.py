"""The report of a study on a terminal: the tables, and below them the verdict, where the eye is at the end."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from normkit.study.records import StudyRecord
from normkit.study.report.statistics import summarize
from normkit.study.report.tables import Cell, Table, tables
from normkit.study.report.verdict import reach_verdict

_ALWAYS = 2  # score and difference are shown on the narrowest terminal
_NO_LIMIT = 1000


def render_terminal(record: StudyRecord) -> RenderableType:
    """The tables and the verdict; columns that the terminal has no room for are in the report's files only.

    Args:
        record: A study, finished or not.
    """
    summaries = summarize(record)
    verdict = reach_verdict(record, summaries)
    words = [_names(verdict.sentence, "bold"), *(_names(caveat, "dim") for caveat in verdict.caveats)]
    return Group(*map(_Fitted, tables(record, summaries)), *words)


@dataclass(frozen=True)
class _Fitted:
    """A table with as many of its columns, from the left, as fit."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        wide = options.update(max_width=_NO_LIMIT)
        kept = len(self.table.columns)
        while kept > _ALWAYS and Measurement.get(console, wide, self._with(kept)).maximum > options.max_width:
            kept -= 1
        yield Text(f"batch size {self.table.batch_size}", style="bold")
        yield self._with(kept)

    def _with(self, columns: int) -> RichTable:
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        shown.add_column("method", overflow="ellipsis")
        for title, _ in self.table.columns[:columns]:
            shown.add_column(Text(title), justify="right", no_wrap=True)
        for row in self.table.rows:
            shown.add_row(Text(row.method, style="bold" if row.reference else ""), *map(_cell, row.cells[:columns]))
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
