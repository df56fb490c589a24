"""The report of a study on a terminal: the verdict and the tables."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evenkeel.study.records import StudyRecord
from evenkeel.study.tables import Cell, tables
from evenkeel.study.verdict import judge


def render_terminal(record: StudyRecord) -> RenderableType:
    """The tables of the report, and below them the verdict, where the eye is when the command ends.

    Args:
        record: A study, finished or not.
    """
    parts: list[RenderableType] = []
    for table in tables(record):
        shown = Table(
            box=box.SIMPLE_HEAD, title=f"batch size {table.batch_size}", title_justify="left", title_style="bold"
        )
        shown.add_column("method", no_wrap=True)
        for title, unit in table.columns:
            shown.add_column(Text.assemble(title, "\n", (unit, "dim")), justify="right")
        for row in table.rows:
            shown.add_row(Text(row.method, style="bold" if row.reference else ""), *map(_cell, row.cells))
        parts.append(shown)
    verdict = judge(record)
    parts.append(_names(verdict.sentence, "bold"))
    parts += [_names(caveat, "dim") for caveat in verdict.caveats]
    return Group(*parts)


def _cell(cell: Cell) -> Text:
    text = Text(cell.text)
    if cell.note:
        text.append(f" {cell.note}", style="dim")
    if cell.alarm:
        text.append(f"\n{cell.alarm}", style="yellow")
    return text


def _names(sentence: str, style: str) -> Text:
    """A sentence with its names, in backticks, set off by colour."""
    pieces = enumerate(sentence.split("`"))
    return Text.assemble(*((piece, "cyan" if k % 2 else "") for k, piece in pieces), style=style)
