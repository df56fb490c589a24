import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from normkit.study.report.statistics import holm, paired_p_value, summarize, t_interval
from tests.study.report.fake_study import realistic, record, result

REFERENCE = (0.90, 0.91, 0.89, 0.93, 0.92, 0.90)
METHOD = (0.93, 0.92, 0.93, 0.94, 0.96, 0.91)
OTHER = (0.91, 0.90, 0.90, 0.92, 0.93, 0.905)


def study(*, method=METHOD, reference=REFERENCE, other=(), **options):
    trials = [result(method="batch", seed=k, accuracy=a) for k, a in enumerate(reference)]
    trials += [result(method="group", seed=k, accuracy=a) for k, a in enumerate(method)]
    trials += [result(method="layer", seed=k, accuracy=a) for k, a in enumerate(other)]
    methods = ["batch", "group", "layer"] if other else ["batch", "group"]
    return record(trials, methods, [64], seeds=len(reference), **options)


def of(summaries, method):
    return next(s for s in summaries if s.method == method)


def test_mean_and_sd_are_those_of_the_finished_runs():
    group = of(summarize(study()), "group")
    assert group.mean == pytest.approx(sum(METHOD) / 6, abs=1e-15)
    assert group.sd == pytest.approx(math.sqrt(sum((a - sum(METHOD) / 6) ** 2 for a in METHOD) / 5), abs=1e-15)
    assert group.lr == pytest.approx(0.1)
    assert group.runs == 6


def test_paired_interval_is_the_textbook_one():
    paired = of(summarize(study(method=(0.93, 0.92, 0.93), reference=(0.90, 0.91, 0.89))), "group").paired
    # differences 0.03, 0.01, 0.04; the 97.5 % quantile of t with 2 degrees of freedom is 4.30265273 (any table)
    mean = 0.08 / 3
    s = math.sqrt(((0.03 - mean) ** 2 + (0.01 - mean) ** 2 + (0.04 - mean) ** 2) / 2)
    assert paired.difference == pytest.approx(mean, abs=1e-12)
    assert paired.low == pytest.approx(mean - 4.30265273 * s / math.sqrt(3), abs=1e-9)
    assert paired.high == pytest.approx(mean + 4.30265273 * s / math.sqrt(3), abs=1e-9)


def test_interval_and_p_agree_with_scipy():
    paired = of(summarize(study()), "group").paired
    test = stats.ttest_rel(METHOD, REFERENCE)
    assert (paired.low, paired.high) == pytest.approx(tuple(test.confidence_interval(0.95)), abs=1e-14)
    assert paired.p == pytest.approx(test.pvalue, abs=1e-14)


@pytest.mark.parametrize(("alternative", "side"), [("two-sided", 2), ("greater", 1)])
def test_p_follows_the_alternative_of_the_plan(alternative, side):
    paired = of(summarize(study(alternative=alternative)), "group").paired
    d = np.subtract(METHOD, REFERENCE)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(6))
    assert paired.p == pytest.approx(side * stats.t.sf(t, 5), rel=1e-10)


def test_no_p_value_below_five_pairs():
    assert of(summarize(study(method=METHOD[:4], reference=REFERENCE[:4])), "group").paired.p is None
    assert of(summarize(study(method=METHOD[:5], reference=REFERENCE[:5])), "group").paired.p is not None
    assert of(summarize(study(method=METHOD[:4])), "group").paired.p is None


def test_no_p_value_in_an_unfinished_study():
    paired = of(summarize(study(planned=100)), "group").paired
    assert paired.p is None
    assert paired.p_holm is None
    assert paired.low is not None


def test_single_pair_has_a_difference_but_no_interval():
    paired = of(summarize(study(method=(0.95,), reference=(0.9,))), "group").paired
    assert paired.difference == pytest.approx(0.05)
    assert paired.low is None
    assert paired.high is None


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 -> kept monotone 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_holm_family_is_the_methods_at_one_batch_size():
    summaries = summarize(study(other=OTHER))
    group, layer = of(summaries, "group").paired, of(summaries, "layer").paired
    assert [group.p_holm, layer.p_holm] == pytest.approx(holm([group.p, layer.p]))
    assert group.p_holm == pytest.approx(2 * group.p)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_keeps_the_order_and_stays_within_bonferroni(values):
    adjusted = holm(values)
    m = len(values)
    assert all(p <= a <= min(1.0, m * p) for p, a in zip(values, adjusted, strict=True))
    ordered = sorted(range(m), key=values.__getitem__)
    assert sorted(adjusted) == [adjusted[i] for i in ordered]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9), st.floats(-1, 1))
def test_interval_moves_with_the_values_and_is_centred_on_their_mean(values, shift):
    assume(np.ptp(values) > 1e-9)
    low, high = t_interval(values)
    assert (low + high) / 2 == pytest.approx(np.mean(values), abs=1e-9)
    moved = t_interval([value + shift for value in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-9)


@given(st.permutations(range(6)))
def test_order_of_the_trials_does_not_matter(order):
    trials = study().trials
    shuffled = [trials[k] for k in order] + [trials[6 + k] for k in order]
    assert summarize(dataclasses.replace(study(), trials=tuple(shuffled))) == summarize(study())


@pytest.mark.parametrize("scale", [1.0, 7e4, 1e-13])
def test_rounding_is_relative_to_the_scores(scale):
    reference = [scale * (1 + 0.1 * k) for k in range(5)]
    shifted = [score + 0.1 * scale for score in reference]
    assert paired_p_value(shifted, reference, "two-sided") is None
    clear = [score + scale * (0.1 + 0.01 * k) for k, score in enumerate(reference)]
    assert 0 < paired_p_value(clear, reference, "two-sided") < 0.01


def test_equal_accuracies_give_p_of_one_and_equal_shifts_none():
    assert paired_p_value(REFERENCE, REFERENCE, "two-sided") == pytest.approx(1.0)
    assert paired_p_value([a + 0.01 for a in REFERENCE], REFERENCE, "two-sided") is None


@pytest.mark.parametrize(("state", "field"), [("diverged", "diverged"), ("failed", "failed")])
def test_lost_runs_are_counted_and_left_out_of_mean_and_pairs(state, field):
    whole = study()
    lost = [dataclasses.replace(t, state=state, test_score=None) if t.key.seed == 2 else t for t in whole.trials[6:]]
    group = of(summarize(dataclasses.replace(whole, trials=(*whole.trials[:6], *lost))), "group")
    assert getattr(group, field) == 1
    assert group.runs == 6
    kept = [k for k in range(6) if k != 2]
    assert group.scores == tuple(METHOD[k] for k in kept)
    assert group.paired.pairs == 5
    assert group.paired.difference == pytest.approx(np.mean([METHOD[k] - REFERENCE[k] for k in kept]))


def test_all_diverged_has_no_mean_and_no_pair():
    trials = [result(method="batch", seed=k, state="diverged") for k in range(3)]
    (batch,) = summarize(record(trials, ["batch"], [64]))
    assert (batch.mean, batch.sd, batch.paired, batch.diverged, batch.runs) == (None, None, None, 3, 3)


def test_search_trials_do_not_enter():
    whole = study()
    more = (*whole.trials, result("search", "group", 64, 0.1, 1000, 0.01))
    assert summarize(dataclasses.replace(whole, trials=more, planned=13)) == summarize(whole)


def test_every_method_and_batch_size_of_the_plan_has_a_summary_before_any_trial():
    summaries = summarize(record([], ["batch", "group"], [64, 1]))
    assert [(s.method, s.batch_size) for s in summaries] == [("batch", 64), ("group", 64), ("batch", 1), ("group", 1)]
    assert not any(s.runs for s in summaries)


def test_final_runs_at_two_learning_rates_are_refused():
    trials = [result(lr=0.1, seed=0), result(lr=0.2, seed=1)]
    with pytest.raises(ValueError, match=r"'batch' at batch size 64 have several learning rates \[0.1, 0.2\]"):
        summarize(record(trials))


def test_a_method_for_which_no_learning_rate_worked_has_none():
    failed = dataclasses.replace(result(method="batch", lr=0.0, state="failed"), test_score=None)
    assert of(summarize(record([failed], ["batch"], [64], seeds=1)), "batch").lr is None


def test_whole_study_keeps_the_plans_order():
    summaries = summarize(realistic())
    assert [s.batch_size for s in summaries] == [64] * 5 + [8] * 5 + [1] * 5
    assert [s.method for s in summaries[:5]] == ["batch", "group", "layer", "batch-renorm", "none"]
