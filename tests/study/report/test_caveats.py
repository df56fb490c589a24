"""Comparisons named beforehand, a second reference, and a margin of equivalence: what the report says of them."""

import dataclasses
import random

import pytest
from scipy import stats

from normkit.study.records import Metric
from normkit.study.report.render import render_html, render_markdown
from normkit.study.report.statistics import holm, summarize
from normkit.study.report.tables import tables
from tests.study.report.fake_study import record, result
from tests.study.report.test_verdict import searched, verdict_of

LEVELS = {
    "batch": {64: 0.95, 1: 0.80},
    "group": {64: 0.92, 1: 0.90},
    "bnp": {64: 0.951, 1: 0.93},
    "none": {64: 0.80, 1: 0.99},
}


def study(levels, seeds, **options):
    """levels: method -> {batch size: mean accuracy}, with a spread of 0.3 points."""
    source = random.Random(3)
    trials = [
        result(method=method, size=size, seed=seed, accuracy=level + source.gauss(0, 0.003))
        for method, sizes in levels.items()
        for size, level in sizes.items()
        for seed in range(seeds)
    ]
    return record(trials, tuple(levels), tuple(next(iter(levels.values()))), seeds=seeds, **options)


def cells(study, size, method):
    """Title -> text of one row of the report's tables."""
    table = next(t for t in tables(study, summarize(study)) if t.title == f"Batch size {size}")
    row = next(row for row in table.rows if row.method == method)
    return {title: str(cell) for (title, _), cell in zip(table.columns, row.cells, strict=True)}


def compared(study):
    return {(s.method, s.batch_size): s for s in summarize(study)}


def test_holm_family_is_all_primary_comparisons_with_both_references_at_all_batch_sizes():
    found = compared(study(LEVELS, 6, primary=["bnp"]))
    pairs = [pair for size in (64, 1) for s in [found["bnp", size]] for pair in (s.paired, s.second)]
    assert [pair.p_holm for pair in pairs] == pytest.approx(holm([pair.p for pair in pairs]))
    against_group = stats.ttest_rel(found["bnp", 1].scores, found["group", 1].scores)
    assert found["bnp", 1].second.p == pytest.approx(against_group.pvalue)


def test_what_is_not_primary_is_measured_and_neither_tested_nor_in_the_verdict():
    exploring = study(LEVELS, 6, primary=["bnp"])
    none = compared(exploring)["none", 1]
    assert none.exploratory
    assert none.paired.difference == pytest.approx(0.19, abs=0.01)
    assert none.paired.low is not None
    assert (none.paired.p, none.paired.p_holm, none.second) == (None, None, None)
    assert cells(exploring, 1, "none")["p"] == "–"
    verdict = verdict_of(exploring)
    assert verdict.sentence.startswith("At batch size 1 `bnp` reached 92.")
    assert verdict.sentence.endswith("; at 64 no primary method differs from `batch` beyond the noise.")
    assert "`none` is exploratory: nothing is claimed about it." in verdict.caveats
    assert "did better too" not in verdict.sentence
    assert verdict_of(study(LEVELS, 6)).sentence.startswith("At batch size 1 `none` reached 98.")


def test_primary_methods_are_compared_with_group_too():
    verdict = verdict_of(study(LEVELS, 6, primary=["bnp"]))
    assert verdict.caveats[0] == "`bnp` at batch sizes 64 (+3.2) and 1 (+3.0) is ahead of `group` beyond the noise."
    assert verdict.caveats[1] == (
        "Differences are claimed at the 5 % level, Holm-corrected over the comparisons of `bnp` with `batch` and `group` at all "
        "batch sizes."
    )
    level = study(LEVELS | {"bnp": LEVELS["group"]}, 6, primary=["bnp"])
    assert verdict_of(level).caveats[0] == "No primary method differs from `group` beyond the noise."


@pytest.mark.parametrize("primary", [["group"], ["group", "bnp"]])
def test_group_is_no_second_reference_where_it_is_primary(primary):
    found = study(LEVELS, 6, primary=primary)
    assert not any(s.second for s in summarize(found))
    assert "with `batch` at all batch sizes" in verdict_of(found).caveats[0]


def test_no_claim_against_a_second_reference_at_the_edge_of_its_grid():
    edge = searched(study(LEVELS, 6, primary=["bnp"]), {("group", 1): 0.01})
    found = compared(edge)
    assert (found["bnp", 1].second.p_holm, found["bnp", 64].second.p_holm is None) == (None, False)
    assert found["bnp", 1].paired.p_holm is not None
    assert verdict_of(edge).caveats[:2] == (
        "The best learning rate of `group` at batch size 1 lies at the edge of its grid (0.01): no claim against `group` is made "
        "there; widen it with --lr-extend or --lr-points, or give --lr.",
        "`bnp` at batch size 64 (+3.2) is ahead of `group` beyond the noise.",
    )


def test_page_table_and_terminal_mark_what_is_exploratory():
    exploring = study(LEVELS, 6, primary=["bnp"])
    text = render_markdown(exploring, summarize(exploring))
    assert "| `none` (exploratory) |" in text
    assert "| `group` (second reference) |" in text
    assert "| `bnp` |" in text
    assert 'none <span class="quiet">exploratory</span>' in render_html(exploring, summarize(exploring))
    assert "exploratory" not in render_markdown(study(LEVELS, 6), summarize(study(LEVELS, 6)))


def test_before_a_primary_method_has_run_there_is_nothing_to_say():
    early = [result(method="none", seed=0)]
    verdict = verdict_of(record(early, ("batch", "bnp", "none"), (64,), planned=99, primary=["bnp"]))
    assert verdict.sentence == "No final run of a primary method has ended yet."


def test_margin_is_judged_in_points_by_two_one_sided_tests():
    kinds = {"a": "same", "b": "no worse", "c": "worse", "d": "no worse", "e": "not decided"}
    shifts = {"a": 0.0, "b": 0.02, "c": -0.02, "d": 0.006, "e": -0.006}
    own = (0.95, 0.952, 0.949, 0.947, 0.951, 0.95)
    trials = [result(method="batch", seed=k, accuracy=score) for k, score in enumerate(own)]
    trials += [
        result(method=m, seed=k, accuracy=own[k] + shift + 0.003 * (-1) ** k)
        for m, shift in shifts.items()
        for k in range(6)
    ]
    judged = record(trials, ("batch", *kinds), (64,), seeds=6, margin=0.7)
    found = compared(judged)
    for method, kind in kinds.items():
        differences = [x - y for x, y in zip(found[method, 64].scores, own, strict=True)]
        not_worse = stats.ttest_1samp(differences, -0.007, alternative="greater").pvalue < 0.05
        not_better = stats.ttest_1samp(differences, 0.007, alternative="less").pvalue < 0.05
        assert (kind in {"same", "no worse"}) == not_worse
        assert (kind == "same") == (not_worse and not_better)
        assert found[method, 64].paired.equivalence == kind
        assert cells(judged, 64, method)["within 0.7 points"] == kind
    assert verdict_of(judged).caveats[0] == (
        "`a` at batch size 64 is the same as `batch` within 0.7 points; `b` at batch size 64 and `d` at batch size 64 are no "
        "more than 0.7 points worse than `batch`; `c` at batch size 64 is more than 0.7 points worse than `batch`; `e` at batch "
        "size 64 is not decided against `batch` at a margin of 0.7 points (paired 90 % intervals)."
    )


def test_margin_is_in_the_scores_unit_and_follows_its_direction():
    metric = dataclasses.asdict(Metric("RMSE", "mm", higher_is_better=False))
    lower = study({"batch": {64: 5.0}, "low": {64: 4.0}, "high": {64: 6.0}}, 6, metric=metric, margin=0.5)
    found = compared(lower)
    assert [found[m, 64].paired.equivalence for m in ("low", "high")] == ["no worse", "worse"]
    assert "within 0.5 mm" in cells(lower, 64, "low")


def test_a_margin_of_one_is_one_point():
    judged = study({"batch": {64: 0.95}, "bnp": {64: 0.95}}, 6, margin=1.0)
    assert verdict_of(judged).caveats[0].startswith("`bnp` at batch size 64 is the same as `batch` within 1 point (")


def test_no_equivalence_where_nothing_is_claimed():
    few = study(LEVELS, 4, margin=0.5)
    assert "Equivalence within 0.5 points is not judged with fewer than 5 seeds." in verdict_of(few).caveats
    unfinished = dataclasses.replace(study(LEVELS, 6, margin=0.5), planned=99)
    edge = searched(study(LEVELS, 6, margin=0.5), {("batch", size): 0.01 for size in (64, 1)})
    for silent in (few, unfinished, edge):
        assert not any(s.paired.equivalence for s in summarize(silent) if s.paired)
    exploring = compared(study(LEVELS, 6, margin=0.5, primary=["bnp"]))
    assert exploring["none", 64].paired.equivalence is None
    assert exploring["bnp", 64].paired.equivalence == "same"
    assert exploring["bnp", 64].second.equivalence == "no worse"
