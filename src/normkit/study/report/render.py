"""The report of a study as files: a self-contained HTML page, Markdown, JSON with everything, a CSV of the trials."""

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from normkit.study.landscape.records import Trace
from normkit.study.records import StudyRecord
from normkit.study.report.figures import by_batch_size, by_learning_rate, training_curves
from normkit.study.report.format import enumerate_words, format_duration, pluralize
from normkit.study.report.landscape import sections as landscape_sections
from normkit.study.report.statistics import summarize
from normkit.study.report.tables import edges, judging, tables, troubles
from normkit.study.report.verdict import judge

CSV_COLUMNS = (
    *("phase", "method", "batch_size", "lr", "seed", "state", "validation_accuracy", "validation_loss"),
    *("test_accuracy", "test_loss", "train_eval_gap", "best_step", "seconds", "validation_seconds", "error"),
)


def write_report(record: StudyRecord, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``results.json`` and ``trials.csv``; the same record gives the same bytes.

    Args:
        record: A study, finished or not.
        folder: Where to write; made if it is not there.

    Returns:
        The files, in the order above.
    """
    texts = {
        "report.html": render_html(record),
        "report.md": render_markdown(record),
        "results.json": results_json(record),
        "trials.csv": trials_csv(record),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]


def render_html(record: StudyRecord) -> str:
    """The page: no script, nothing loaded from outside, every text of the study escaped."""
    return _render(
        "report.html.j2",
        record,
        by_batch_size=by_batch_size(record),
        curves=training_curves(record),
        by_learning_rate=by_learning_rate(record),
        landscape=landscape_sections([Trace(**trace) for trace in record.landscape]),
    )


def render_markdown(record: StudyRecord) -> str:
    """The words and tables of the page, without its figures."""
    return _render("report.md.j2", record)


def results_json(record: StudyRecord) -> str:
    """Everything as JSON: the record, and what the report says of it. Numbers that are not finite become null."""
    summaries = [{**asdict(s), "mean": s.mean, "sd": s.sd} for s in summarize(record)]
    content = {"verdict": asdict(judge(record)), "summaries": summaries, "record": record.to_dict()}
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_results(path: Path) -> StudyRecord:
    """The record that a ``results.json`` was made from."""
    return StudyRecord.from_dict(json.loads(path.read_text(encoding="utf-8"))["record"])


def trials_csv(record: StudyRecord) -> str:
    """One line per trial, columns as in ``CSV_COLUMNS``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(trial), **asdict(trial.key)} for trial in record.trials)
    return text.getvalue()


def prose(text: str) -> Markup:
    """A sentence with names in backticks as HTML.

    >>> str(prose("`a<b` won"))
    '<code>a&lt;b</code> won'
    """
    pieces = enumerate(text.replace(" %", "\N{NO-BREAK SPACE}%").split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(piece) if k % 2 else escape(piece) for k, piece in pieces)


def markdown_code(text: object) -> str:
    r"""Any text as one Markdown code span that fits a table cell.

    >>> print(markdown_code("a|b"))
    `a\|b`
    """
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


def _render(template: str, record: StudyRecord, **figures: Any) -> str:
    environment = Environment(
        loader=PackageLoader("normkit.study.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "pluralize": pluralize,
        "enumerate": enumerate_words,
        "prose": prose,
        "code": markdown_code,
        "number": "{:,}".format,
    }
    found = {
        "verdict": judge(record),
        "tables": tables(record),
        "edges": edges(record),
        "judging": judging(record),
        "pruned": sum(trial.state == "pruned" for trial in record.trials),
        "troubles": troubles(record),
        "took": format_duration(sum(trial.seconds for trial in record.trials)) if record.trials else "",
    }
    return environment.get_template(template).render(record=record, config=record.config, **found, **figures)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
