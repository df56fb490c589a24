"""Positions in a chart: scales, round tick values, labels that do not overlap."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        title: What it shows, with the unit.
        low: Value at the left or bottom end (larger than ``high`` on an axis that runs backwards).
        high: Value at the right or top end.
        ticks: Values with a label.
        show: Text of a value.
        scale: Monotone function that is drawn linearly (``math.log2`` for a logarithmic axis).
        mark: A value to draw a dotted line at, with its name; None for no line.
    """

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    show: Callable[[float], str] = "{:g}".format
    scale: Callable[[float], float] = float
    mark: tuple[float, str] | None = None

    def place(self, value: float, start: float, end: float) -> float:
        """Position of a value on the stretch from ``start`` to ``end``; the middle where the axis has no length."""
        low, high = self.scale(self.low), self.scale(self.high)
        share = 0.5 if low == high else (self.scale(value) - low) / (high - low)
        return start + share * (end - start)


def nice_ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Round values that cover [low, high], at most about ``wanted`` steps apart.

    >>> nice_ticks(0.0, 1.0)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    if not high > low:
        high = low + 1.0
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(k * step, 12) for k in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten within [low, high], as far as there are two, else more.

    Else with 3 between them, or with 2 and 5; the ends themselves where nothing else is within.

    >>> log_ticks(0.01, 1.0), log_ticks(0.002, 0.05)
    ((0.01, 0.1, 1.0), (0.003, 0.01, 0.03))
    """
    powers = range(math.floor(math.log10(low) - 1e-9), math.ceil(math.log10(high) + 1e-9) + 1)
    found: tuple[float, ...] = ()
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
        found = tuple(value for value in values if low * 0.999 <= value <= high * 1.001)
        if len(found) > 1:
            break
    return found or tuple(dict.fromkeys((low, high)))


def separate(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Return positions closest to the wanted ones that are ``gap`` apart and, as far as there is room, within [low, high].

    Closest in least squares: with ``q[k] = p[k] - k * gap`` this is isotonic regression.

    >>> separate([10.0, 11.0, 50.0], 0.0, 100.0, gap=10.0)
    [5.5, 15.5, 50.0]
    """
    if not wanted:
        return []
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    room = max(low, high - steps[-1])
    positions = np.empty(len(wanted))
    positions[order] = np.clip(isotonic_regression(np.asarray(wanted)[order] - steps).x, low, room) + steps
    return positions.tolist()
