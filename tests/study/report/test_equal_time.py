"""Equal time beside equal examples: curves over time, and where they are read off."""

import dataclasses

import pytest

from normkit.study.records import Cost, CurvePoint
from normkit.study.report.equal_time import at_equal_time, equal_time_note, over_time, timed_curves
from normkit.study.report.render import render_html, render_markdown
from normkit.study.report.statistics import summarize
from tests.study.report.fake_study import realistic, record, result

SCORES = {"batch": (0.5, 0.7, 0.8), "slow": (0.6, 0.8, 0.9), "fast": (0.4, 0.5, 0.6)}  # after 400, 800, 1200 examples
STEP = {"batch": 0.01, "slow": 0.02, "fast": 0.005}
COSTS = tuple(Cost(method, 10, seconds) for method, seconds in STEP.items())


def curve(scores):
    """A curve with losses at every 200 examples and scores at every 400."""
    points = [CurvePoint(examples, 1.0, None) for examples in (200, 600, 1000)]
    points += [CurvePoint(400 * k, 1.0, score) for k, score in enumerate(scores, start=1)]
    return tuple(sorted(points, key=lambda point: point.examples))


def study(costs=COSTS, seconds=None, **options):
    """Two seeds, 0.02 apart; ``seconds``: method -> wall time of a run, 1 s of it on validation."""
    trials = [
        dataclasses.replace(
            result("final", method, 10, 0.1, seed, curve=curve([score + 0.02 * (seed - 0.5) for score in scores])),
            seconds=0.0 if seconds is None else seconds[method],
            validation_seconds=0.0 if seconds is None else 1.0,
        )
        for method, scores in SCORES.items()
        for seed in (0, 1)
    ]
    return record(
        trials, tuple(SCORES), (10,), seeds=2, costs=costs, **{"budget": 1200, "schedule": "cosine", **options}
    )


def test_time_is_steps_times_the_measured_time_of_a_step_and_scores_are_means_over_seeds():
    slow = timed_curves(study())["slow", 10]
    assert slow.seconds == pytest.approx((0.8, 1.6, 2.4))
    assert slow.scores == pytest.approx((0.6, 0.8, 0.9))


def test_methods_are_read_off_where_the_reference_ends():
    rows = {row.method: str(row.cells[0]) for row in at_equal_time(study()).rows}
    assert rows == {  # the reference ends after 1.2 s, half way between the slow method's first two points
        "batch": "80.0 % (80.0)",
        "slow": "70.0 % (90.0) after 50 % of the examples",
        "fast": "60.0 % (60.0) in 50 % of the time",
    }


def test_a_method_that_is_not_validated_before_the_reference_ends_has_no_score_there():
    costs = (Cost("batch", 10, 0.01), Cost("slow", 10, 0.05), Cost("fast", 10, 0.005))
    assert str(at_equal_time(study(costs)).rows[1].cells[0]) == "– (90.0) after 20 % of the examples"


def test_without_measured_steps_the_wall_time_without_validation_stands_in_for_all():
    wall = study(COSTS[:1], seconds={"batch": 3.0, "slow": 5.0, "fast": 2.0})  # 120 steps
    assert timed_curves(wall)["slow", 10].seconds[-1] == pytest.approx(4.0)
    assert timed_curves(wall)["batch", 10].seconds[-1] == pytest.approx(2.0)
    assert "wall time" in equal_time_note(wall)
    assert "measured time per step" in equal_time_note(study())


def end_points_only(study):
    last = [dataclasses.replace(trial, curve=trial.curve[-1:]) for trial in study.trials]
    return dataclasses.replace(study, trials=tuple(last))


@pytest.mark.parametrize(
    "silent",
    [end_points_only(study()), study(()), record([result()], ["batch"], [64]), realistic(), record([], planned=9)],
    ids=["end points", "no time", "one run", "losses only", "nothing"],
)
def test_nothing_is_said_where_there_is_no_curve_or_no_time(silent):
    assert at_equal_time(silent) is None
    assert over_time(silent) == []
    assert "equal time" not in render_markdown(silent, summarize(silent))
    assert "Equal time" not in render_html(silent, summarize(silent))


def test_the_figure_runs_to_the_end_of_the_slowest_method():
    (panel,) = over_time(study())
    assert panel.title == "Batch size 10"
    assert "slow ends at 90.0 % after 2.4 s" in panel.chart
    assert "training time, s" in panel.chart
    minutes = tuple(dataclasses.replace(cost, step_seconds=100 * (cost.step_seconds or 0.0)) for cost in COSTS)
    assert "slow ends at 90.0 % after 4 min" in over_time(study(minutes))[0].chart


def test_a_schedule_that_falls_is_told_as_a_limit_of_the_comparison():
    assert "before its schedule has ended" in render_markdown(study(), summarize(study()))
    assert "before its schedule" not in equal_time_note(study(schedule="constant"))
