"""The plan: what is fair by construction, and what is refused."""

import dataclasses
import itertools
import json
import math

import pytest

from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.plan import SEARCH_SEED, Slot, choose_lr, learning_rates, resolve, search_rates, slots, validate
from normkit.study.records import TrialKey, TrialResult

CONFIG = StudyConfig(methods=("batch", "group"), batch_sizes=(8, 64), seeds=3, lr_points=4)


def searched(lr, accuracy, *, state="finished", seed=SEARCH_SEED, loss=1.0, error=None):
    key = TrialKey("search", "batch", 64, lr, seed)
    return TrialResult(key, state, validation_score=accuracy, validation_loss=loss, error=error)


def test_every_method_gets_the_same_number_of_rates_and_seeds():
    plan = slots(CONFIG)
    counts = {
        (phase, method, size): sum((s.phase, s.method, s.batch_size) == (phase, method, size) for s in plan)
        for phase in ("search", "final")
        for method in CONFIG.methods
        for size in CONFIG.batch_sizes
    }
    assert {n for (phase, *_), n in counts.items() if phase == "search"} == {4}
    assert {n for (phase, *_), n in counts.items() if phase == "final"} == {3}
    assert len(plan) == len(set(plan)) == 2 * 2 * (4 + 3)


def test_search_and_final_seeds_never_meet():
    plan = slots(dataclasses.replace(CONFIG, seeds=50, search_seeds=50))
    assert not {s.seed for s in plan if s.phase == "search"} & {s.seed for s in plan if s.phase == "final"}


def test_a_fixed_rate_needs_no_search():
    plan = slots(dataclasses.replace(CONFIG, lr=0.1))
    assert {s.phase for s in plan} == {"final"}
    assert {s.lr for s in plan} == {0.1}


def test_the_grid_is_a_factor_root_ten_apart_around_the_recipes_centre():
    rates = learning_rates(CONFIG, "batch", 64)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10**0.5] * 3, rel=1e-2)
    assert (rates[1] * rates[2]) ** 0.5 == pytest.approx(0.1, rel=1e-2)


def test_a_method_with_settings_is_a_method_of_its_own_around_its_recipes_centre():
    config = dataclasses.replace(CONFIG, methods=("revisited", "revisited:scale=0.2"))
    validate(config)
    assert learning_rates(config, "revisited:scale=0.2", 64) == learning_rates(config, "revisited", 64)
    assert len({s.method for s in slots(config)}) == 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("revisted:scale=0.2", "unknown method 'revisted'; did you mean 'revisited'"),
        ("revisited:scal=0.2", "--methods revisited:scal=0.2: unknown option 'scal'; did you mean 'scale'"),
        ("batch:scale=0.2", "'batch' has no options"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(method, message):
    with pytest.raises(StudyError, match=message):
        validate(dataclasses.replace(CONFIG, methods=(method,)))


def test_the_best_mean_accuracy_wins_then_the_lower_loss():
    assert choose_lr([searched(0.1, 0.8), searched(0.3, 0.9)]) == 0.3
    assert choose_lr([searched(0.1, 0.9, loss=0.2), searched(0.3, 0.9, loss=0.5)]) == 0.1


def test_a_rate_with_a_diverged_seed_is_chosen_only_when_all_diverge():
    diverged = searched(0.3, None, state="diverged", seed=SEARCH_SEED + 1)
    assert choose_lr([searched(0.1, 0.5), searched(0.3, 0.9), diverged]) == 0.1
    assert choose_lr([searched(0.3, None, state="diverged"), searched(1.0, None, state="diverged")]) == 0.3
    assert choose_lr([searched(0.1, None, state="failed", error="no")]) is None


def test_a_final_slot_waits_for_the_whole_search_of_its_cell():
    final = Slot("final", "batch", 64, None, 0)
    rates = learning_rates(CONFIG, "batch", 64)
    results = [searched(lr, accuracy) for lr, accuracy in zip(rates, (0.5, 0.6, 0.9, 0.7), strict=True)]
    assert resolve(final, results[:-1], CONFIG) is None
    assert resolve(final, results, CONFIG) == TrialKey("final", "batch", 64, rates[2], 0)


def score_at(best):
    """A search's results over rates: the closer to the best rate, the higher the accuracy."""
    return lambda rates: [searched(lr, 1 / (1 + abs(math.log(lr / best)))) for lr in rates]


@pytest.mark.parametrize(("best", "below", "above"), [(0.1, 0, 0), (0.0125, 1, 0), (0.006, 2, 0), (3.0, 0, 2)])
def test_a_grid_grows_until_its_best_rate_lies_inside(best, below, above):
    grid = learning_rates(CONFIG, "batch", 64)
    results = score_at(best)
    while (grown := search_rates(CONFIG, "batch", 64, results(grid))) != grid:
        assert set(grid) < set(grown)
        assert len(grown) == len(grid) + 1
        grid = grown
    assert grid == learning_rates(CONFIG, "batch", 64, below=below, above=above)
    final = Slot("final", "batch", 64, None, 0)
    chosen = resolve(final, results(grid), CONFIG)
    assert chosen.lr not in (grid[0], grid[-1])
    assert resolve(final, list(reversed(results(grid))), CONFIG) == chosen


def test_a_grid_grows_by_three_points_at_most_on_a_side():
    wide = learning_rates(CONFIG, "batch", 64, below=5)
    assert search_rates(CONFIG, "batch", 64, score_at(1e-9)(wide)) == learning_rates(CONFIG, "batch", 64, below=3)
    fixed = dataclasses.replace(CONFIG, lr_extend=0)
    assert search_rates(fixed, "batch", 64, score_at(1e-9)(wide)) == learning_rates(CONFIG, "batch", 64)


def test_a_search_of_one_rate_stays_one():
    one = dataclasses.replace(CONFIG, lr_points=1)
    grid = learning_rates(one, "batch", 64)
    assert search_rates(one, "batch", 64, score_at(9.0)(grid)) == grid


def test_the_plan_has_the_rates_that_its_searches_have_come_to():
    results = score_at(1e-3)(learning_rates(CONFIG, "batch", 64))
    added = set(slots(CONFIG, results)) - set(slots(CONFIG))
    assert added == {Slot("search", "batch", 64, learning_rates(CONFIG, "batch", 64, below=1)[0], SEARCH_SEED)}


@pytest.mark.parametrize(("share", "samples"), [(1.0, 1500), (0.5, 750), (200, 200), (0.001, 64)])
def test_a_search_may_see_less_than_the_budget_but_one_batch_of_every_size(share, samples):
    config = dataclasses.replace(CONFIG, search_budget=share)
    validate(config)
    assert (config.budget_of("search"), config.budget_of("final")) == (samples, 1500)


def test_a_cell_in_which_nothing_runs_says_why():
    final = Slot("final", "batch", 64, None, 0)
    results = [
        searched(lr, None, state="failed", error="one value per channel") for lr in learning_rates(CONFIG, "batch", 64)
    ]
    assert resolve(final, results, CONFIG) == "one value per channel"


def test_a_configuration_survives_its_json():
    assert StudyConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "--methods is empty"),
        ({"methods": ("bach",)}, "unknown method 'bach'; did you mean 'batch'"),
        ({"methods": ("batch", "batch")}, "batch given twice"),
        ({"batch_sizes": ()}, "--batch-sizes is empty"),
        ({"batch_sizes": (0,)}, "--batch-sizes: 0"),
        ({"batch_sizes": (64, 5000)}, "larger than the budget"),
        ({"seeds": 0}, "--seeds 0"),
        ({"budget": 0}, "--budget 0: give at least 1"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr_points": 0}, "--lr-points 0"),
        ({"lr_extend": -1}, "--lr-extend -1: give a number from 0"),
        ({"search_budget": 0.0}, "--search-budget 0: give a fraction"),
        ({"search_budget": 2000.0}, "--search-budget 2000: give a fraction .* up to 1500"),
        ({"search_budget": 1.5}, r"--search-budget 1\.5: give a fraction"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0"),
        ({"micro_batch": -1}, "--micro-batch -1"),
        (
            {"batch_sizes": (27,), "budget": 1000},
            "--budget: of 1000 samples a last batch of one .* 27; give 999 or 1026",
        ),
        (
            {"batch_sizes": (8,), "search_budget": 161.0},
            "--search-budget: of 161 samples a last batch of one .* give 160 or 168",
        ),
        (
            {"batch_sizes": (33,), "micro_batch": 16},
            "--micro-batch: 16 would leave a micro-batch of one sample of a batch of 33",
        ),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_remedy(change, message):
    with pytest.raises(StudyError, match=message):
        validate(dataclasses.replace(CONFIG, **change))


def test_a_rate_for_each_method_is_used_without_a_search():
    config = StudyConfig(methods=("batch", "sgd-g"), batch_sizes=(64, 8), seeds=1, lr={"batch": 0.1, "sgd-g": 0.2})
    assert {(slot.phase, slot.method, slot.lr) for slot in slots(config)} == {
        ("final", "batch", 0.1),
        ("final", "sgd-g", 0.2),
    }
    assert learning_rates(config, "sgd-g", 8) == [0.2]
    assert StudyConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("rates", [{"batch": 0.1}, {"batch": 0.1, "bnp": 0.1, "group": 0.1}])
def test_rates_must_be_those_of_the_methods(rates):
    with pytest.raises(StudyError, match=r"--lr: .*give one for each of batch, group"):
        validate(StudyConfig(methods=("batch", "group"), lr=rates))


def test_each_of_the_rates_must_be_positive():
    with pytest.raises(StudyError, match=r"--lr -1\.0: a learning rate is a positive number"):
        validate(StudyConfig(methods=("batch", "group"), lr={"batch": 0.1, "group": -1.0}))
