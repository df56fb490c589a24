"""``normkit reproduce``: run a preset at a scale and put its figures beside the paper's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normkit._errors import nearest
from normkit.study.compare import compare
from normkit.study.config import StudyConfig
from normkit.study.environment import command_line
from normkit.study.errors import StudyError
from normkit.study.files import write_file
from normkit.study.papers.how_bn_helps import DEEP_LINEAR_STEPS, VGG_STEPS
from normkit.study.papers.presets import PRESETS, SANTURKAR
from normkit.study.papers.scaling import Comparison, Preset, scaled
from normkit.study.records import StudyRecord
from normkit.study.report.page import render_template
from normkit.study.report.statistics import summarize
from normkit.study.report.tables import selection_note

MEASURED = "how-bn-helps"  # a command of its own: it measures single runs instead of comparing many


def preset_list() -> str:
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
    def size(arm: Preset) -> str:
        searched = any(comparison.config.lr == "auto" for comparison in arm.comparisons)
        return (
            f"{'at least ' if searched else ''}{arm.runs:,} runs, {arm.examples / 1e6:,.0f} million training examples"
        )

    fixed = preset.at_paper_rates()
    return size(preset) + (f"; with --paper-rates {size(fixed)}" if fixed is not None else "")


def find(name: str, *, model: str | None = None, paper_rates: bool = False) -> Preset:
    """The preset of that name, one of ``PRESETS``, on one network and with the paper's learning rates if asked for.

    Raises:
        StudyError: There is none, or not so.
    """
    if name not in PRESETS:
        raise StudyError(f"unknown preset {name!r}; {nearest(name, [*PRESETS, MEASURED])}")
    preset = PRESETS[name]
    if model is not None:
        networks = ", ".join(row.label for row in preset.comparisons)
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
    workers: int = 0,
    quiet: bool = True,
    arguments: Sequence[str] = ("reproduce",),
) -> tuple[str, list[StudyRecord]]:
    """Run all comparisons of a preset, each a study of its own in a folder under ``out``, and write ``reproduce.md`` there.

    Args:
        name: Name of the preset.
        scale: Share of the paper's budget, in (0, 1].
        out: Output folder.
        changes: Fields of the configuration that the user sets: ``data``, ``seeds``, ``device`` ...
        model: Only this network of the preset, or in place of its only one.
        paper_rates: Train at the paper's learning rates instead of searching for each method's own.
        workers: Trials side by side; 0 for one per core.
        quiet: Show no progress.
        arguments: The command line that was given.

    Returns:
        The page, Markdown, and the record of each comparison.

    Raises:
        StudyError: Bad input.
    """
    if not 0 < scale <= 1:
        raise StudyError(f"--scale {scale}: give a share of the paper's budget in (0, 1]")
    preset = find(name, model=model, paper_rates=paper_rates)
    results: list[tuple[Comparison, StudyConfig, StudyRecord, list[str]]] = []
    for row in preset.comparisons:
        sizes = {"batch_sizes": changes["batch_sizes"]} if "batch_sizes" in changes else {}
        config, shrunk = scaled(replace(row.config, **sizes), scale)
        config = replace(config, **changes)
        if isinstance(config.lr, dict):
            unknown = [method for method in config.methods if method not in config.lr]
            if unknown:
                raise StudyError(f"--paper-rates: {name} has no learning rate for {', '.join(unknown)}; leave one out")
            config = replace(config, lr={method: config.lr[method] for method in config.methods})
        less = [text for field, text in shrunk.items() if field not in changes]
        less += [f"--{key.replace('_', '-')} {_argument(value)}" for key, value in changes.items() if key != "device"]
        if config.model not in {row.config.model for row in PRESETS[name].comparisons}:
            less.append(f"--model {config.model}")
        folder = out / "".join(c if c.isalnum() or c == "-" else "-" for c in row.label)
        record, _ = compare(config, folder, workers=workers, quiet=quiet, command=command_line(arguments))
        results.append((row, config, record, less))
    text = page(name, preset, results, scale)
    write_file(out / "reproduce.md", text)
    return text, [record for _, _, record, _ in results]


def _argument(value: object) -> str:
    """A value as it stands on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def page(
    name: str, preset: Preset, results: Sequence[tuple[Comparison, StudyConfig, StudyRecord, list[str]]], scale: float
) -> str:
    """Set our figures beside the paper's, with the seeds and with what was scaled down."""
    return render_template(
        "reproduce.md.j2",
        name=name,
        preset=preset,
        scale=scale,
        config=results[0][1],
        command=results[0][2].command,
        at_paper_rates=all(isinstance(config.lr, dict) for _, config, _, _ in results),
        rows=[(comparison, config, s) for comparison, config, record, _ in results for s in summarize(record)],
        notes={comparison.label: selection_note(record) for comparison, _, record, _ in results},
        reduced={comparison.label: less for comparison, _, _, less in results if less},
        data=sorted({text for _, _, record, _ in results if (text := record.config.get("data_summary"))}),
    )
