"""Every figure that README and docs/choosing.md claim stands in a committed result that the same section links.

A figure is a decimal number or a number with %. In a table whose rows start with a method it must be a figure of that method; in
text, of a method that the paragraph names, if it names one.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

import normkit
from tests.test_docs import ROOT

PAGES = [ROOT / "README.md", ROOT / "docs/choosing.md"]
RESULTS = (ROOT / "docs/results", ROOT / "benchmarks/results")
SETTINGS = ("initial scale 0.1", "Python 3.10", "Apache-2.0")  # set or by definition
FIGURE = re.compile(r"(?<![\w.])(\d+\.\d+|\d+(?= ?%))(?![\w.]*\d)")


def figures(text: str) -> list[str]:
    """The figures of a text, without code, link targets and arXiv numbers."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\b\d{4}\.\d{5}\b", "", text)
    for setting in SETTINGS:
        text = text.replace(setting, "")
    return [figure for figure in FIGURE.findall(text) if figure != "1.00"]  # the reference, relative to itself


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of a JSON value, each with the keys that lead to it and the names beside it."""
    if isinstance(value, dict):
        names = tuple(item for item in value.values() if isinstance(item, str))
        for key, item in value.items():
            yield from leaves(item, (*path, *names, key))
    elif isinstance(value, list):
        numbers = [item for item in value if isinstance(item, (int, float))]
        if numbers:
            yield path, mean(numbers)
        for item in value:
            yield from leaves(item, path)
    elif isinstance(value, (int, float)):
        yield path, value


def means(runs: list[dict]) -> list[dict]:
    """Runs that differ by their seed and what they measured alone, averaged."""
    measured = {key for run in runs for key, value in run.items() if isinstance(value, float)} - {"lr"}
    cells = defaultdict(list)
    for run in runs:
        fixed = {key: value for key, value in run.items() if key not in measured | {"seed", "validation"}}
        cells[json.dumps(fixed, sort_keys=True)].append(run)
    return [
        json.loads(cell)
        | {key: mean(run[key] for run in found) for key in measured if all(key in run for run in found)}
        for cell, found in cells.items()
    ]


@cache
def lines(source: Path) -> list[tuple[str, frozenset[str] | float]]:
    """What a result holds: (text that names methods, figures as they are printed, or one number of any precision)."""
    text = source.read_text()
    if source.suffix == ".md":
        return [(line, frozenset(figures(re.sub(r"`[^`]*`", "", line)))) for line in text.splitlines()]
    content = means([json.loads(line) for line in text.splitlines()]) if source.suffix == ".jsonl" else json.loads(text)
    return [(" ".join(f"`{part}`" for part in path), value) for path, value in leaves(content)]


def holds(source: Path, method: str | None, figure: str) -> bool:
    """Whether a result has a figure, of this method if one is given, on a folded network or not."""
    digits = len(figure.partition(".")[2])
    names = (f"`{method}`", f"`fold+{method}`")

    def is_it(found: frozenset[str] | float) -> bool:
        if isinstance(found, frozenset):
            return figure in found
        return figure in (f"{found:.{digits}f}", f"{100 * found:.{digits}f}")

    return any(is_it(found) for text, found in lines(source) if method is None or any(name in text for name in names))


def missing(page: Path, text: str) -> list[str]:
    """The figures of a page that no result has which their section links."""
    found = []
    for section in re.split(r"^(?=## )", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE):
        targets = [page.parent / target for target in re.findall(r"\]\(([^)#]+)", section) if "://" not in target]
        sources = [t.resolve() for t in targets if any(t.resolve().is_relative_to(folder) for folder in RESULTS)]
        for block in re.split(r"\n\s*\n|\n(?=\|)", section):
            named = [name for name in re.findall(r"`([^`]+)`", block) if name in normkit.recipes()]
            cells = [figures(cell) for cell in block.split("|")] if block.startswith("| `") else [figures(block)]
            for cell in cells:  # the figures of a cell are of one result
                if not any(
                    all(any(holds(source, method, figure) for method in named or [None]) for figure in cell)
                    for source in sources or [None]
                    if source is not None or not cell
                ):
                    found += [f"{' / '.join(cell)} in: {' '.join(block.split())[:80]}"]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_is_in_a_committed_result(page):
    assert missing(page, page.read_text()) == []


def test_readme_ranks_only_methods_whose_networks_have_learned():
    rows = [line for line in PAGES[0].read_text().splitlines() if line.startswith("| `") and "|" in line[3:]]
    accuracies = [float(figure) for row in rows for figure in figures(row)]
    assert len(accuracies) > 10
    assert min(accuracies) >= 60


def test_an_invented_figure_of_a_table_is_found():
    rows = [
        (page, line)
        for page in PAGES
        for line in page.read_text().splitlines()
        if line.startswith("| `") and figures(line)
    ]
    assert rows
    for page, row in rows:
        invented = re.sub(r"\d\.\d", lambda match: f"{(int(match[0][0]) + 4) % 10}.{match[0][2]}", row)
        assert missing(page, page.read_text().replace(row, invented)), row


def test_an_invented_figure_in_text_is_found():
    text = "## Cost\n\nA step of `bnp` takes 3.33 times as long, [measured](benchmarks/results/cpu.json).\n"
    assert missing(ROOT / "README.md", text)
    steps = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())["result"]
    step = steps["step and peak memory, ResNet-20"]["found"]["batch 128"]["time relative to batch"]["bnp"]["median"]
    assert missing(ROOT / "README.md", text.replace("3.33", f"{step:.2f}")) == []
    assert missing(ROOT / "README.md", "It reaches 93.4 %.\n"), "no result is linked"
