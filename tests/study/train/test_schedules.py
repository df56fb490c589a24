import itertools
from typing import get_args

import pytest

from normkit.study.config import Schedule
from normkit.study.train.schedules import lr_factor


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("warm_up", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 200])
def test_factors_stay_in_the_unit_interval_and_reach_their_peak(schedule, warm_up, steps):
    factors = [lr_factor(schedule, step, steps, warm_up) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    if steps == 200:
        assert max(factors) == pytest.approx(1, abs=1e-3)


def test_warm_up_rises_linearly_to_the_schedule():
    factors = [lr_factor("constant", step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10:] == [1.0] * 90


def test_step_drops_by_five_at_30_60_and_80_percent():
    factors = [lr_factor("step", step, 200, 0.0) for step in range(200)]
    drops = [i for i in range(1, 200) if factors[i] < factors[i - 1]]
    assert drops == [60, 120, 160]
    assert factors[199] == pytest.approx(0.2**3)


def test_cosine_falls_without_rest():
    factors = [lr_factor("cosine", step, 50, 0.0) for step in range(50)]
    assert all(a > b for a, b in itertools.pairwise(factors))
