"""``normkit reproduce``: run a preset at a scale and put its figures beside the paper's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normkit._errors import nearest
from normkit.study.compare import compare
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.papers.how_bn_helps import DEEP_LINEAR_STEPS, VGG_STEPS
from normkit.study.papers.presets import PRESETS, SANTURKAR
from normkit.study.papers.scaling import Preset, Row, scaled
from normkit.study.records import StudyRecord
from normkit.study.report.format import format_p, format_points
from normkit.study.report.statistics import Summary, summarize
from normkit.study.report.tables import judging

MEASURED = "how-bn-helps"  # a command of its own: it measures single runs instead of comparing many


def listing() -> str:
    """All presets with their cost at the papers' size."""
    width = max(map(len, [*PRESETS, MEASURED]))
    lines = [
        f"{name:<{width}}  {preset.summary}\n{'':<{width}}  {preset.paper}; {_cost(preset)}"
        for name, preset in PRESETS.items()
    ]
    lines.append(
        f"{MEASURED:<{width}}  Smoothness of the landscape, covariate shift, stability of activations\n"
        f"{'':<{width}}  {SANTURKAR}; 7 runs of {VGG_STEPS:,} steps (VGG) or {DEEP_LINEAR_STEPS:,} (deep linear network)"
    )
    return "\n".join(lines)


def _cost(preset: Preset) -> str:
    def told(arm: Preset) -> str:
        return f"{arm.runs:,} runs, {arm.examples / 1e6:,.0f} million training examples"

    fixed = preset.at_paper_rates()
    return told(preset) + (f"; with --paper-rates {told(fixed)}" if fixed is not None else "")


def find(name: str, *, model: str | None = None, paper_rates: bool = False) -> Preset:
    """The preset of that name, one of ``PRESETS``, on one network and with the paper's learning rates if asked for.

    Raises:
        StudyError: There is none, or not so.
    """
    if name not in PRESETS:
        raise StudyError(f"unknown preset {name!r}; {nearest(name, [*PRESETS, MEASURED])}")
    preset = PRESETS[name]
    if model is not None:
        networks = ", ".join(row.label for row in preset.rows)
        preset = preset.on(model)
        if preset is None:
            raise StudyError(f"--model {model}: {name} compares several networks; choose one of {networks}")
    if paper_rates:
        preset = preset.at_paper_rates()
        if preset is None:
            raise StudyError(f"--paper-rates: the learning rates of {name} are not known here; leave the option out")
    return preset


def reproduce(
    name: str,
    *,
    scale: float,
    out: Path,
    changes: dict[str, Any],
    model: str | None = None,
    paper_rates: bool = False,
    workers: int | None,
    quiet: bool,
    arguments: Sequence[str],
) -> str:
    """Run all rows of a preset, each a study of its own in a folder under ``out``, and write ``reproduce.md`` there.

    Args:
        name: Name of the preset.
        scale: Share of the paper's budget, in (0, 1].
        out: Output folder.
        changes: Fields of the configuration that the user sets: ``data``, ``seeds``, ``device`` ...
        model: Only this network of the preset, or in place of its only one.
        paper_rates: Train at the paper's learning rates instead of searching for each method's own.
        workers: Trials side by side; default one per core.
        quiet: Show no progress.
        arguments: The command line that was given.

    Returns:
        The page, Markdown.

    Raises:
        StudyError: Bad input.
    """
    if not 0 < scale <= 1:
        raise StudyError(f"--scale {scale}: give a share of the paper's budget in (0, 1]")
    preset = find(name, model=model, paper_rates=paper_rates)
    results: list[tuple[Row, StudyConfig, StudyRecord, list[str]]] = []
    for row in preset.rows:
        config, shrunk = scaled(row.config, scale)
        config = replace(config, **changes)
        if isinstance(config.lr, dict):
            unknown = [method for method in config.methods if method not in config.lr]
            if unknown:
                raise StudyError(f"--paper-rates: {name} has no learning rate for {', '.join(unknown)}; leave one out")
            config = replace(config, lr={method: config.lr[method] for method in config.methods})
        less = [text for field, text in shrunk.items() if field not in changes]
        less += [f"--{key.replace('_', '-')} {_argument(value)}" for key, value in changes.items() if key != "device"]
        if config.model not in {row.config.model for row in PRESETS[name].rows}:
            less.append(f"--model {config.model}")
        folder = out / "".join(c if c.isalnum() or c == "-" else "-" for c in row.label)
        record, _ = compare(config, folder, workers=workers, quiet=quiet, arguments=arguments)
        results.append((row, config, record, less))
    text = page(name, preset, results, scale)
    (out / "reproduce.md").write_text(text, encoding="utf-8")
    return text


def _argument(value: object) -> str:
    """A value as it stands on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def page(
    name: str, preset: Preset, results: Sequence[tuple[Row, StudyConfig, StudyRecord, list[str]]], scale: float
) -> str:
    """Our figures beside the paper's, with the seeds and with what was scaled down."""
    lines = [f"# {name}: {preset.summary}", "", f"{preset.paper}. {preset.note}".strip(), ""]
    lines += [
        "Every method trains at the learning rate that the paper gives it."
        if all(isinstance(config.lr, dict) for _, config, _, _ in results)
        else "Every method has a learning rate of its own, picked from a grid of the same size on a validation split.",
        "",
    ]
    first = results[0][1]
    lines += [
        f"| | method | batch size | test accuracy, here (%) | seeds | difference to {first.reference} (points) "
        f"| p ({first.alternative}, Holm) | learning rate | published (%) |"
    ]
    lines += ["|---|---|---:|---:|---|---:|---:|---:|---:|"]
    for row, config, record, _ in results:
        for summary in summarize(record):
            published = row.published.get(summary.method)
            lines.append(
                f"| {row.label} | {summary.method} | {summary.batch_size} | {_accuracy(summary)} "
                f"| {', '.join(map(str, range(config.seeds)))} | {_difference(summary)} | {_number(summary.lr, '{:g}')} "
                f"| {_number(published, '{:.2f}')} |"
            )
    judged = [f"- {row.label}: {text}" for row, _, record, _ in results if (text := judging(record))]
    if judged:
        lines += ["", "## What was judged", "", *judged]
    reduced = {row.label: less for row, _, _, less in results if less}
    lines += ["", "## What was scaled down", ""]
    if scale < 1:
        lines += [
            f"This is a run at scale {scale:g}: the published figures are those of full training, not a target here.",
            "",
        ]
    lines += [f"- {label}: {'; '.join(less)}" for label, less in reduced.items()] or ["Nothing."]
    lines += ["", "## Data", ""]
    lines += sorted({
        f"- {record.config['data_summary']}" for _, _, record, _ in results if record.config.get("data_summary")
    })
    lines += ["", "## How to get this again", "", "```", results[0][2].command, "```", ""]
    return "\n".join(lines)


def _accuracy(summary: Summary) -> str:
    if summary.mean is None:
        return "diverged" if summary.diverged else "failed" if summary.failed else "not run"
    spread = f" ± {100 * summary.sd:.2f}" if summary.sd is not None else ""
    lost = f" ({summary.diverged + summary.failed} lost)" if summary.diverged + summary.failed else ""
    return f"{100 * summary.mean:.2f}{spread}{lost}"


def _difference(summary: Summary) -> str:
    """Two cells: the difference to the reference with its interval, and its p-value."""
    paired = summary.paired
    if paired is None:
        return " | "
    interval = (
        f" [{format_points(paired.low)}, {format_points(paired.high)}]"
        if paired.low is not None and paired.high is not None
        else ""
    )
    return (
        f"{format_points(paired.difference)}{interval} | {format_p(paired.p_holm) if paired.p_holm is not None else ''}"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
