import dataclasses

import pytest

from normkit.study.report.statistics import summarize
from normkit.study.report.tables import failed_runs, tables
from normkit.study.report.verdict import reach_verdict
from tests.study.report.fake_study import realistic, record, result

NOISE = (0.004, -0.003, 0.001, -0.004, 0.002, 0.0)


def verdict_of(record):
    return reach_verdict(record, summarize(record))


def tables_of(record):
    return tables(record, summarize(record))


def study(levels, seeds=3, lost=(), **options):
    """levels: method -> {batch size: mean accuracy}; lost: (method, batch size, seed, state)."""
    trials = []
    for index, (method, sizes) in enumerate(levels.items()):
        for size, level in sizes.items():
            for seed in range(seeds):
                state = next((s for m, b, k, s in lost if (m, b, k) == (method, size, seed)), "finished")
                accuracy = level + NOISE[(seed + 2 * index) % 6]
                trials.append(result(method=method, size=size, seed=seed, accuracy=accuracy, state=state))
    sizes = list(dict.fromkeys(size for by_size in levels.values() for size in by_size))
    return record(trials, list(levels), sizes, seeds=seeds, **options)


SPLIT = {"batch": {64: 0.95, 8: 0.94, 1: 0.1}, "group": {64: 0.951, 8: 0.941, 1: 0.912}}


@pytest.mark.parametrize("seeds", [3, 6])
def test_collapse_of_the_reference_is_told_first_and_the_rest_as_noise(seeds):
    sentence = verdict_of(study(SPLIT, seeds)).sentence
    assert sentence.startswith("At batch size 1 `group` reached 91.")
    assert "where `batch` stayed near chance at 10." in sentence
    assert sentence.endswith("; at 64 and 8 no method differs from `batch` beyond the noise.")


def test_fall_above_chance_is_told_as_a_fall():
    levels = {"batch": {64: 0.95, 1: 0.5}, "group": {64: 0.95, 1: 0.9}}
    assert "where `batch` fell to 50." in verdict_of(study(levels)).sentence


def test_a_score_without_chance_level_stays_near_none():
    levels = {"batch": {64: -0.77}, "none": {64: -0.14}}
    trials = study(levels, 6, chance=None, metric={"name": "score", "unit": "", "higher_is_better": True})
    assert "chance" not in verdict_of(trials).sentence


def test_where_seeds_are_lost_the_difference_on_the_shared_ones_is_told():
    trials = [result(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.9, 0.901, 0.902, 0.1, 0.9))]
    for seed, accuracy in enumerate((0.8, 0.81, 0.8, None, 0.805)):
        lost = {"state": "diverged"} if accuracy is None else {"accuracy": accuracy}
        trials.append(result(method="group", seed=seed, **lost))
    sentence = verdict_of(record(trials, ("batch", "group"), (64,), seeds=4)).sentence
    assert sentence.endswith("and `group` (80.4 %; −9.7 points on 4 shared seeds) did worse.")


def test_level_methods_are_told_as_level():
    levels = {"batch": {64: 0.95}, "group": {64: 0.951}}
    assert verdict_of(study(levels)).sentence == "At batch size 64 no method differs from `batch` beyond the noise."


def test_one_sided_study_says_only_what_it_asked():
    levels = {"batch": {64: 0.95}, "group": {64: 0.80}}
    sentence = verdict_of(study(levels, 6, alternative="greater")).sentence
    assert sentence == "At batch size 64 no method is shown to be better than `batch` beyond the noise."


def test_worse_method_is_named_and_a_higher_mean_within_the_noise_is_not_denied():
    levels = {"batch": {64: 0.95}, "group": {64: 0.80}, "layer": {64: 0.951}}
    sentence = verdict_of(study(levels)).sentence
    assert sentence.startswith("At batch size 64 no method did better than `batch` (95.")
    assert sentence.endswith("%) beyond the noise, and `group` (80.0 %) did worse.")


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_a_difference_that_is_the_same_for_every_seed_has_no_interval_and_is_not_told_as_beyond_the_noise(seeds):
    accuracies = {"batch": 0.94, "none": 0.97}  # few test examples make few different accuracies
    trials = [result(method=m, seed=k, accuracy=a + 0.01 * k) for m, a in accuracies.items() for k in range(seeds)]
    even = record(trials, tuple(accuracies), (64,), seeds=seeds)
    (paired,) = [s.paired for s in summarize(even) if s.paired]
    assert (paired.low, paired.high, paired.p) == (None, None, None)
    assert verdict_of(even).sentence.startswith("At batch size 64 `none` reached 9")
    assert "against" not in verdict_of(even).sentence
    assert str(tables_of(even)[0].rows[1].cells[1]) == "+3.0 (every pair)"


def test_few_seeds_claim_nothing_and_many_say_at_which_level():
    assert verdict_of(study(SPLIT, 3)).caveats == (
        "Measured with 3 seeds, too few for a claim: there are 95 % intervals but no p-values.",
    )
    assert verdict_of(study(SPLIT, 6)).caveats == (
        "Differences are claimed at the 5 % level, Holm-corrected over the methods at each batch size.",
    )


def test_one_seed_tells_numbers_and_no_difference():
    verdict = verdict_of(study({"batch": {64: 0.95}, "group": {64: 0.5}}, 1))
    assert verdict.sentence == "At batch size 64 `batch` reached 95.4 % and `group` 50.1 %."
    assert verdict.caveats == ("One seed gives no measure of the noise: nothing is claimed.",)


def test_diverged_run_is_in_the_verdict_and_its_pairs_are_not_claimed():
    verdict = verdict_of(study(SPLIT | {"layer": {64: 0.95, 8: 0.94, 1: 0.9}}, 5, lost=[("layer", 1, 2, "diverged")]))
    assert "`layer`" not in verdict.sentence
    assert verdict.caveats[0].endswith("; not tested, and so not claimed: `layer` at batch size 1.")
    assert verdict.caveats[1] == "Diverged, and left out of the means: `layer` at batch size 1 in 1 of 5 runs."


@pytest.mark.parametrize(("state", "word"), [("diverged", "diverged"), ("failed", "failed")])
def test_lost_reference_is_told_in_the_sentence(state, word):
    lost = [("batch", 1, seed, state) for seed in range(3)]
    verdict = verdict_of(study(SPLIT, lost=lost))
    assert f"`group` reached 91.2 %, while every run of `batch` {word}" in verdict.sentence
    assert verdict.caveats[1].startswith(f"{word.capitalize()}, and left out of the means: `batch` at batch size 1")


def test_unfinished_study_says_so_and_claims_nothing():
    verdict = verdict_of(dataclasses.replace(study(SPLIT, 6), planned=99))
    assert verdict.caveats == (
        "The study is not finished (36 of 99 trials): numbers will change and nothing is claimed.",
    )


def test_single_method_is_not_compared():
    sentence = verdict_of(study({"group": {64: 0.95, 1: 0.9}})).sentence
    assert sentence == (
        "`group` reached 95.1 % at batch size 64 and 90.1 % at batch size 1, with no other method to compare it to."
    )


def test_study_without_final_runs_or_without_accuracies_has_a_sentence():
    assert verdict_of(record([])).sentence == "No final run has ended yet, so there is nothing to compare."
    lost = record([result(state="diverged")])
    assert verdict_of(lost).sentence == "No final run finished: every one diverged or failed."


def searched(study, chosen, rates=(0.01, 0.1, 1.0)):
    """The study after a search over ``rates``; ``chosen``: (method, batch size) -> rate of the final runs, else 0.1."""
    cells = dict.fromkeys((t.key.method, t.key.batch_size) for t in study.trials)
    search = [result("search", *cell, lr, 1000, 0.9) for cell in cells for lr in rates]
    finals = [
        dataclasses.replace(t, key=dataclasses.replace(t.key, lr=chosen.get((t.key.method, t.key.batch_size), 0.1)))
        for t in study.trials
    ]
    return dataclasses.replace(study, trials=(*search, *finals), planned=len(search) + len(finals))


def test_no_claim_is_made_where_the_reference_is_at_the_edge_of_its_grid():
    levels = {"batch": {64: 0.9, 8: 0.8}, "group": {64: 0.95, 8: 0.95}}
    claimed, refused = (searched(study(levels, 6), chosen) for chosen in ({}, {("batch", 8): 1.0}))
    assert all(s.paired.p_holm < 0.05 for s in summarize(claimed) if s.paired)
    assert verdict_of(claimed).sentence.startswith("At batch size 8 `group` reached 95.")
    group = {s.batch_size: s.paired for s in summarize(refused) if s.method == "group"}
    assert (group[8].p, group[8].p_holm) == (None, None)
    assert group[8].low is not None  # the measurement stays
    assert group[64].p_holm < 0.05
    verdict = verdict_of(refused)
    assert verdict.sentence.startswith("At batch size 64 `group` reached 95.")
    assert verdict.sentence.endswith(
        "; at 8 no claim is made, since the best learning rate of `batch` lies at the edge of its grid."
    )
    assert verdict.caveats == (
        "The best learning rate of `batch` at batch size 8 lies at the edge of its grid (1): no claim is made there; widen it "
        "with --lr-extend or --lr-points, or give --lr.",
        "Differences are claimed at the 5 % level, Holm-corrected over the methods at each batch size.",
    )


def test_no_claim_at_all_where_the_reference_is_always_at_the_edge():
    everywhere = searched(study(SPLIT, 6), {("batch", size): 0.01 for size in (64, 8, 1)})
    verdict = verdict_of(everywhere)
    assert verdict.sentence == (
        "At batch sizes 64, 8 and 1 no claim is made, since the best learning rate of `batch` lies at the edge of its grid."
    )
    assert len(verdict.caveats) == 1
    assert verdict.caveats[0].startswith(
        "The best learning rates of `batch` at batch sizes 64, 8 and 1 lie at the edges"
    )
    assert not any(title == "p" for table in tables_of(everywhere) for title, _ in table.columns)


def test_a_method_at_the_edge_of_its_grid_is_marked_and_named_and_still_compared():
    edge = searched(study({"batch": {64: 0.9}, "group": {64: 0.95}}, 6), {("group", 64): 0.01})
    verdict = verdict_of(edge)
    assert verdict.sentence.startswith("At batch size 64 `group` reached 95.")
    assert verdict.caveats[0] == (
        "The best learning rate lies at the edge of the grid, so that a better one may lie beyond, for `group` at batch size "
        "64 (0.01)."
    )
    (table,) = tables_of(edge)
    at = [title for title, _ in table.columns].index("learning rate")
    assert [str(row.cells[at]) for row in table.rows] == ["0.1", "0.01 edge of its grid"]


@pytest.mark.parametrize("rates", [(), (0.1,)], ids=["given", "one"])
def test_a_rate_without_a_grid_is_at_no_edge(rates):
    alone = searched(study(SPLIT, 6), {}, rates)
    assert not any(s.at_edge for s in summarize(alone))
    assert "edge" not in " ".join([verdict_of(alone).sentence, *verdict_of(alone).caveats])


def test_a_rate_beyond_which_runs_diverge_is_not_at_the_edge():
    inside = searched(study({"batch": {64: 0.9}, "group": {64: 0.95}}), {}, (0.01, 0.1))
    beyond = tuple(result("search", method, 64, 1.0, 1000, state="diverged") for method in ("batch", "group"))
    assert all(s.at_edge for s in summarize(inside))
    assert not any(s.at_edge for s in summarize(dataclasses.replace(inside, trials=(*beyond, *inside.trials))))


def test_tables_tell_every_cell_of_the_plan_and_leave_empty_columns_out():
    whole = tables_of(realistic(seeds=5))
    assert [table.title for table in whole] == ["Batch size 64", "Batch size 8", "Batch size 1"]
    assert [title for title, _ in whole[0].columns] == [
        *("test accuracy", "difference to batch", "p", "learning rate", "time", "memory", "train/eval gap")
    ]
    bare = tables_of(record([]))[0]
    assert [title for title, _ in bare.columns] == ["test accuracy", "difference to batch"]
    assert [str(row.cells[0]) for row in bare.rows] == ["– not run yet"] * 5


def test_runs_that_went_wrong_alike_are_counted_together():
    trials = [result("final", seed=k, state="failed", error="out of memory") for k in range(3)]
    (trouble,) = failed_runs(record(trials))
    assert (trouble.runs, trouble.what) == (3, "failed: out of memory")
