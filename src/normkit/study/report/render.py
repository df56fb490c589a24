"""The report of a study as files: a self-contained HTML page, Markdown, JSON with everything, a CSV of the trials."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normkit.study.files import write_file
from normkit.study.landscape.records import Trace
from normkit.study.records import StudyRecord
from normkit.study.report.caveats import correction
from normkit.study.report.equal_time import at_equal_time, equal_time_note, over_time
from normkit.study.report.figures import by_batch_size, by_learning_rate, by_rate_factor, training_curves
from normkit.study.report.format import format_duration
from normkit.study.report.landscape import sections as landscape_sections
from normkit.study.report.page import render_template
from normkit.study.report.rates import search_note
from normkit.study.report.robustness import robustness
from normkit.study.report.statistics import Summary, summarize
from normkit.study.report.tables import failed_runs, selection_note, tables
from normkit.study.report.verdict import reach_verdict

CSV_COLUMNS = (
    *("phase", "method", "batch_size", "lr", "seed", "state", "validation_score", "validation_loss"),
    *("test_score", "test_loss", "train_eval_gap", "best_step", "seconds", "validation_seconds", "error"),
)


def write_report(record: StudyRecord, folder: Path) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``results.json`` and ``trials.csv``; the same record gives the same bytes.

    Args:
        record: A study, finished or not.
        folder: Where to write; made if it is not there.

    Returns:
        The files, in the order above.
    """
    summaries = summarize(record)
    texts = {
        "report.html": render_html(record, summaries),
        "report.md": render_markdown(record, summaries),
        "results.json": results_json(record, summaries),
        "trials.csv": trials_csv(record),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_file(folder / name, text)
    return [folder / name for name in texts]


def render_html(record: StudyRecord, summaries: Sequence[Summary]) -> str:
    """The page: no script, nothing loaded from outside, every text of the study escaped."""
    return _render(
        "report.html.j2",
        record,
        summaries,
        by_batch_size=by_batch_size(record, summaries),
        curves=training_curves(record),
        by_learning_rate=by_learning_rate(record, summaries),
        by_rate_factor=by_rate_factor(record, summaries),
        over_time=over_time(record),
        landscape=landscape_sections([Trace.from_dict(trace) for trace in record.landscape]),
    )


def render_markdown(record: StudyRecord, summaries: Sequence[Summary]) -> str:
    """The words and tables of the page, without its figures."""
    return _render("report.md.j2", record, summaries)


def results_json(record: StudyRecord, summaries: Sequence[Summary]) -> str:
    """Everything as JSON: the record, and what the report says of it. Numbers that are not finite become null."""
    rows = [{**asdict(s), "mean": s.mean, "sd": s.sd} for s in summaries]
    content = {"verdict": asdict(reach_verdict(record, summaries)), "summaries": rows, "record": record.to_dict()}
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_results(path: Path) -> StudyRecord:
    """The record that a ``results.json`` was made from."""
    return StudyRecord.from_dict(json.loads(path.read_text(encoding="utf-8"))["record"])


def trials_csv(record: StudyRecord) -> str:
    """One line per trial, columns as in ``CSV_COLUMNS``, scores called after the metric."""
    text, column = io.StringIO(), record.metric.column
    columns = [name.replace("_score", f"_{column}") for name in CSV_COLUMNS]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**trial.to_dict(column), **asdict(trial.key)} for trial in record.trials)
    return text.getvalue()


def _render(template: str, record: StudyRecord, summaries: Sequence[Summary], **figures: Any) -> str:
    found = {
        "verdict": reach_verdict(record, summaries),
        "tables": tables(record, summaries),
        "correction": correction(record),
        "robustness": robustness(record, summaries),
        "at_equal_time": at_equal_time(record),
        "equal_time_note": equal_time_note(record),
        "search_note": search_note(record),
        "selection_note": selection_note(record),
        "pruned": sum(trial.state == "pruned" for trial in record.trials),
        "failed_runs": failed_runs(record),
        "took": format_duration(sum(trial.seconds for trial in record.trials)) if record.trials else "",
    }
    return render_template(template, record=record, config=record.config, **found, **figures)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
