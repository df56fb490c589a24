"""Draws the figure of README and of the site's first page: accuracy against batch size.

python docs/images/draw.py    # docs/results/digits.json to docs/images/accuracy-light.svg and accuracy-dark.svg
"""

import re
from pathlib import Path

from normkit.study.report.figures import by_batch_size
from normkit.study.report.render import read_results
from normkit.study.report.statistics import summarize

IMAGES = Path(__file__).parent
RESULTS = IMAGES.parent / "results" / "digits.json"
STYLE = Path(__file__).parents[2] / "src/normkit/study/report/templates/report.css"


def standalone(chart: str, dark: bool) -> str:
    """A report's chart as a file of its own, with the colours of the report's style sheet.

    Args:
        chart: What ``line_chart`` returned.
        dark: For a dark background.
    """
    css = STYLE.read_text(encoding="utf-8")
    colours = re.findall(r":root \{.*?\}", css, re.DOTALL)[dark]
    shapes = css[css.index(".c0 {") : css.index(".scroll {")]
    style = f"<style>\n{colours}\nsvg {{ font-family: system-ui, sans-serif; }}\n{shapes}</style>"
    head, rest = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def main() -> None:
    """Write both files."""
    record = read_results(RESULTS)
    wide = str(by_batch_size(record, summarize(record))[0])
    for name, dark in (("light", False), ("dark", True)):
        (IMAGES / f"accuracy-{name}.svg").write_text(standalone(wide, dark), encoding="utf-8")


if __name__ == "__main__":
    main()
