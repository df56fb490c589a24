"""What one grid point off the best learning rate costs: the table against numbers by hand, and its figure."""

import pytest

from normkit.study.records import Metric
from normkit.study.report.figures import by_rate_factor
from normkit.study.report.render import render_html, render_markdown
from normkit.study.report.robustness import robustness
from normkit.study.report.statistics import summarize
from tests.study.report.fake_study import realistic, record, result

RATES = (0.01, 0.0316, 0.1, 0.316)
SCORES = {  # method -> batch size -> validation score at each rate, None where the run diverged; the best is at 0.0316
    "batch": {64: (0.80, 0.90, 0.88, 0.70), 1: (0.70, 0.80, 0.60, 0.50)},
    "bnp": {64: (0.85, 0.86, 0.85, 0.80), 1: (0.79, 0.80, 0.79, 0.70)},
    "none": {64: (0.60, 0.70, None, None), 1: (0.60, 0.64, 0.62, None)},
}


def study(**options):
    cells = [(method, size) for method in SCORES for size in (64, 1)]
    search = [
        result("search", method, size, lr, 1000, score or 0.0, "finished" if score else "diverged")
        for method, size in cells
        for lr, score in zip(RATES, SCORES[method][size], strict=True)
    ]
    finals = [result("final", method, size, 0.0316, seed) for method, size in cells for seed in range(2)]
    return record([*search, *finals], tuple(SCORES), (64, 1), seeds=2, **options)


def table_of(study):
    return robustness(study, summarize(study))


def test_changes_to_the_next_lower_and_higher_rate_and_their_mean():
    table = table_of(study())
    assert [title for title, _ in table.columns] == ["batch size 64", "batch size 1", "mean change"]
    rows = {row.method: [str(cell) for cell in row.cells] for row in table.rows}
    assert rows["batch"] == ["−10.0, −2.0", "−10.0, −20.0", "−10.5"]
    assert rows["bnp"] == ["−1.0, −1.0", "−1.0, −1.0", "−1.0"]


def test_the_most_robust_method_comes_first_and_one_that_diverges_last():
    rows = table_of(study()).rows
    assert [row.method for row in rows] == ["bnp", "batch", "none"]
    assert [str(cell) for cell in rows[-1].cells] == ["−10.0, diverged", "−4.0, −2.0", "−5.3 diverged 1 of 4"]


def test_a_rise_is_the_worse_way_where_lower_is_better():
    errors = {"metric": {"name": "RMSE", "unit": "mm", "higher_is_better": False}}
    assert Metric(**errors["metric"]).signed(1.0) == -1.0
    assert [row.method for row in table_of(study(**errors)).rows] == ["batch", "bnp", "none"]


def test_a_side_beyond_the_grid_is_left_out():
    edge = study()
    finals = [result("final", "batch", 64, 0.01, seed) for seed in range(2)]
    searched = [
        t for t in edge.trials if t.key.phase == "search" and t.key.method == "batch" and t.key.batch_size == 64
    ]
    (row,) = table_of(record([*searched, *finals], ("batch",), (64,), seeds=2)).rows
    assert [str(cell) for cell in row.cells] == ["–, +10.0", "+10.0"]


@pytest.mark.parametrize("trials", [(), tuple(result(seed=seed) for seed in range(2))], ids=["nothing", "given rates"])
def test_without_a_search_there_is_no_table_and_no_section(trials):
    bare = record(trials, ("batch",), (64,))
    assert table_of(bare) is None
    assert "One grid point off" not in render_markdown(bare, summarize(bare))
    assert "Robustness" not in render_html(bare, summarize(bare))


def test_the_figure_shows_each_rate_as_a_multiple_of_the_best_one():
    small, large = by_rate_factor(study(), summarize(study()))
    assert (small.title, large.title) == ("Batch size 64", "Batch size 1")
    assert "bnp is best at 1 with 86.0 %" in small.chart
    assert "against multiple of the best rate at batch size 64" in small.chart
    assert small.chart.count('class="mark ') == 10  # of 12 rates two diverged


def test_the_page_folds_table_and_figure_below_the_choice_of_the_rate():
    page = render_html(realistic(), summarize(realistic()))
    choice, robust = page.index('id="h-lr"'), page.index('id="h-robust"')
    assert page.index('id="h-methods"') < choice < robust
    assert page[:robust].endswith("<details>\n<summary><h2 ")
