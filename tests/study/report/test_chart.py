"""What a reader sees of a chart: where values are drawn, how lines are named, and that nothing overlaps or runs out."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from normkit.study.records import Metric
from normkit.study.report.chart import COLOURS, Series, interval, line_chart, swatch
from normkit.study.report.figures import by_batch_size, score_axis
from normkit.study.report.scales import Axis
from normkit.study.report.statistics import summarize
from tests.study.report.fake_study import realistic

X = Axis("batch size", 64, 1, (64, 8, 1), scale=math.log2)
Y = Axis("accuracy, %", 0.0, 1.0, (0.0, 0.5, 1.0), lambda value: f"{100 * value:g}")
SIZE = (400, 300)
MARK = re.compile(r"translate\(([\d.]+) ([\d.]+)\)")


def drawn(series, x=X, y=Y):
    """The chart as a tree."""
    return ElementTree.fromstring(str(line_chart(series, x, y, size=SIZE, alt="a & b")))


def places(chart, kind):
    """Where the shapes of one CSS class are, in drawing order."""
    found = [element for element in chart.iter("path") if element.get("class", "").split()[0] == kind]
    return [tuple(map(float, MARK.fullmatch(element.get("transform")).groups())) for element in found]


def texts(chart, kind):
    """The texts of one CSS class with their places."""
    return {
        element.text: (float(element.get("x")), float(element.get("y")))
        for element in chart.iter("text")
        if kind in element.get("class").split()
    }


def test_values_are_where_the_axes_say():
    chart = drawn([Series("batch", 0, ((64, 0.0), (8, 0.5), (1, 1.0)))])
    marks, ticks, levels = places(chart, "mark"), texts(chart, "mid"), texts(chart, "end")
    for (at, level), tick, value in zip(marks, ("64", "8", "1"), ("0", "50", "100"), strict=True):
        assert at == pytest.approx(ticks[tick][0], abs=0.1)
        assert level == pytest.approx(levels[value][1] - 4, abs=0.1)
    assert marks[0][0] < marks[1][0] < marks[2][0]  # small batches to the right, evenly on a log scale
    assert marks[1][0] - marks[0][0] == pytest.approx(marks[2][0] - marks[1][0], abs=0.2)
    assert marks[0][1] > marks[1][1] > marks[2][1]  # higher is higher


def test_a_line_begins_anew_where_it_is_told_to():
    whole = Series("batch", 0, ((64, 0.0), (1, 1.0), (8, 0.5), (4, 0.2)))
    for line, strokes in ((whole, [4]), (replace(whole, starts=(64, 8)), [2, 2]), (replace(whole, starts=(4,)), [3])):
        (path,) = (e.get("d") for e in drawn([line]).iter("path") if "line" in e.get("class").split())
        assert [len(stroke.split("L")) for stroke in path.split("M")[1:]] == strokes


@pytest.mark.parametrize("values", [[1.3, 1.6], [0.4, 1.3], [35.0, 70.0]])
def test_a_score_in_percent_above_one_has_an_axis_that_covers_it(values):
    axis = score_axis("test", Metric("WER", "%", False), values)
    assert axis.low <= min(values) < max(values) <= axis.high
    assert len(axis.ticks) > 1
    assert score_axis("test", Metric("accuracy", "%"), [0.5, 0.97]).high <= 1.0


def test_every_line_is_named_once_and_no_names_overlap():
    lines = [Series(f"method-{k}", k, ((64, 0.5), (1, 0.9 + k / 1000))) for k in range(9)]
    names = texts(drawn(lines), "name")
    assert set(names) == {line.label for line in lines}
    heights = sorted(level for _, level in names.values())
    assert min(b - a for a, b in pairwise(heights)) >= 13.9
    assert all(0 < level < SIZE[1] for level in heights)


def test_a_name_that_is_too_long_is_cut_and_marked_so():
    name = "a-method-whose-name-nobody-can-remember"
    (shown,) = texts(drawn([Series(name, 0, ((64, 0.5),))]), "name")
    assert shown.endswith("…")
    assert name.startswith(shown[:-1])


def test_diverged_runs_are_crosses_below_the_lines_side_by_side():
    lines = [Series("batch", 0, ((64, 0.0),), crosses=(8,)), Series("none", 1, ((64, 0.0),), crosses=(8,))]
    chart = drawn(lines)
    crosses = places(chart, "cross")
    assert len(set(crosses)) == len(crosses) == 2
    assert min(level for _, level in crosses) > max(level for _, level in places(chart, "mark"))
    assert "no score" in texts(chart, "small")
    assert "no score" not in texts(drawn([Series("batch", 0, ((64, 0.0),))]), "small")


def test_a_line_without_points_is_named_at_its_crosses():
    assert "none" in texts(drawn([Series("none", 1, crosses=(8, 1))]), "name")


def test_the_reference_has_the_ink_and_more_lines_than_colours_are_dashed():
    chart = drawn([Series(f"m{k}", k, ((64, 0.1), (1, 0.2))) for k in range(COLOURS + 1)])
    lines = [path.get("class") for path in chart.iter("path") if path.get("class", "").startswith("line")]
    assert "line c0" in lines
    assert lines.count("line c0 dashed") == 1
    assert "dashed" in str(swatch(COLOURS))
    assert "dashed" not in str(swatch(0))


def test_the_chosen_point_is_ringed():
    chart = drawn([Series("batch", 0, ((64, 0.5), (8, 0.6)), ring=8)])
    (ring,) = [circle for circle in chart.iter("circle") if circle.get("class").startswith("ring")]
    assert (float(ring.get("cx")), float(ring.get("cy"))) == places(chart, "mark")[1]


def test_an_interval_has_zero_in_the_middle_and_its_ends_in_order():
    left, right = map(
        float, re.search(r'class="line c1" d="M([\d.]+) 9H([\d.]+)"', str(interval((-1, 0, 2), 1, 2))).groups()
    )
    assert left < 48 < right
    assert right - 48 == pytest.approx(2 * (48 - left), abs=0.2)


def test_names_and_words_are_text_and_the_chart_says_what_it_shows():
    chart = drawn([Series("<b>", 0, ((64, 0.5),))])
    assert "<b>" in texts(chart, "name")
    assert chart.get("aria-label") == "a & b"


def test_the_main_figure_shows_every_method_at_every_batch_size():
    record = realistic()
    wide, narrow = (ElementTree.fromstring(str(chart)) for chart in by_batch_size(record, summarize(record)))
    for chart in (wide, narrow):
        assert set(texts(chart, "name")) == set(record.config["methods"])
        assert len(places(chart, "mark")) == 15
        assert len(places(chart, "cross")) == 1
        assert all(f"{method}: " in chart.get("aria-label") for method in record.config["methods"])


def test_the_same_study_gives_the_same_figure():
    record = realistic()
    assert by_batch_size(record, summarize(record)) == by_batch_size(record, summarize(record))
