"""What the studies share: runs that are kept in a file, the search of a learning rate among them, and cells of tables."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from normkit.study.report.statistics import t_interval

Result = dict[str, Any]
MORE = 3
"""Rates that the search may add on each side."""


def read(store: Path) -> list[Result]:
    """The finished runs."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


class Runs:
    """Runs that are kept in a file, one JSON line each; what is in it is not run again.

    Args:
        store: The file.
        run: Runs what a specification says; the result contains the specification.
    """

    def __init__(self, store: Path, run: Callable[[dict[str, Any]], Result]) -> None:
        self.store, self.run = store, run

    def result(self, **spec: Any) -> Result:
        """The result of one run."""
        for done in read(self.store):
            if spec.items() <= done.items():
                return done
        result = self.run(spec)
        self.store.parent.mkdir(exist_ok=True)
        with self.store.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
        return result


def best(found: Mapping[float, Result], score: Callable[[Result], Any]) -> float:
    """The rate with the highest score."""
    return max(found, key=lambda lr: score(found[lr]))


def rate_search(centre: float, run: Callable[[float], Result], score: Callable[[Result], Any]) -> float:
    """The best of three rates half a decade apart, and of up to ``MORE`` further ones on each side until it is inside."""
    rates = [float(f"{centre * 10 ** (i / 2):.2g}") for i in range(-1 - MORE, 2 + MORE)]
    found = {lr: run(lr) for lr in rates[MORE:-MORE]}
    while (lr := best(found, score)) in (min(found), max(found)):
        beyond = rates.index(lr) + (1 if lr == max(found) else -1)
        if not 0 <= beyond < len(rates):
            break
        found[rates[beyond]] = run(rates[beyond])
    return lr


def difference(ours: dict[int, float], reference: dict[int, float]) -> str:
    """Mean difference over the seeds that both ran, with its 95 % t interval."""
    differences = [ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())]
    interval = t_interval(differences)
    if interval is None:
        return "–"
    return f"{mean(differences):+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]"


def cell(values: list[float]) -> str:
    """Mean ± standard deviation (how many)."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation} ({len(values)})"
