"""Learning-rate schedules: pure factors of the recipe's rate, the same for every method."""

import math
from collections.abc import Callable

STEP_PLACES, STEP_FACTOR = (0.3, 0.6, 0.8), 0.2  # 60, 120, 160 of 200 epochs, as wide residual networks are trained
TWO_STEP_PLACES, TWO_STEP_FACTOR = (0.375, 0.75), 0.1  # 60, 120 of 160 epochs, as the same networks are trained on SVHN
ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1e-4


def cosine(progress: float) -> float:
    """Half a cosine from 1 down to 0.

    Examples:
        >>> cosine(0.0), round(cosine(0.5), 12), cosine(1.0)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


def staircase(progress: float) -> float:
    """Times 0.2 at 30, 60 and 80 % of the run.

    Examples:
        >>> [round(staircase(p), 3) for p in (0.0, 0.3, 0.6, 0.9)]
        [1.0, 0.2, 0.04, 0.008]
    """
    return STEP_FACTOR ** sum(progress >= place for place in STEP_PLACES)


def two_step(progress: float) -> float:
    """Times 0.1 at 37.5 and 75 % of the run.

    Examples:
        >>> [round(two_step(p), 3) for p in (0.0, 0.375, 0.75)]
        [1.0, 0.1, 0.01]
    """
    return TWO_STEP_FACTOR ** sum(progress >= place for place in TWO_STEP_PLACES)


def one_cycle(progress: float) -> float:
    """Half a cosine up from 1/25 to 1 over the first 30 %, then half a cosine down to 1e-4.

    Examples:
        >>> round(one_cycle(0.0), 3), one_cycle(0.3), round(one_cycle(1.0), 6)
        (0.04, 1.0, 0.0001)
    """
    if progress < ONE_CYCLE_RISE:
        return 1 + (ONE_CYCLE_START - 1) * cosine(progress / ONE_CYCLE_RISE)
    return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * cosine((progress - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "step": staircase,
    "two-step": two_step,
    "one-cycle": one_cycle,
    "constant": lambda _: 1.0,
}


def lr_factor(schedule: str, step: int, steps: int, warm_up: float) -> float:
    """Factor of the learning rate at a step: linear up over the warm-up, then the schedule over what is left.

    Args:
        schedule: One of ``normkit.study.config.Schedule``.
        step: Steps already made.
        steps: Steps of the whole run.
        warm_up: Share of the steps that warm up, in [0, 1); 0 for none.

    Returns:
        A factor in (0, 1], or 0 at the end of a cosine.

    Examples:
        >>> [round(lr_factor("cosine", s, 21, 0.05), 3) for s in (0, 1, 2, 21)]
        [0.333, 0.667, 1.0, 0.0]
    """
    warm = math.ceil(warm_up * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return _SHAPES[schedule]((step - warm) / max(1, steps - warm))
