"""What the benchmarks of the study share: interleaved timing, and results as JSON beside the machine's description."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from normkit.study.environment import environment
from normkit.study.train.allocator import keep_freed_memory

keep_freed_memory()  # as in a study; else the order in which networks were built decides how often a step gets its memory anew


def timer(device: str) -> Callable[[], float]:
    """Processor time where one thread of a CPU does all the work, so that other programs' turns do not count; else the wall's."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronized(step: Callable[[], None], steps: int, device: str) -> Callable[[], None]:
    """``steps`` steps that are really over when the function returns."""

    def run() -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def interleaved(
    tasks: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each task in each round.

    Within a round they follow one another, so that a slow spell hits them all, every other round backwards, so that none gains
    from its place.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for number in range(rounds):
        for name, task in list(tasks.items())[:: -1 if number % 2 else 1]:
            start = clock()
            task()
            seconds[name].append(clock() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of paired times."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    count = len(ratios)
    return {"median": median(ratios), "low": ratios[count // 4], "high": ratios[-1 - count // 4]}


def save(name: str, command: str, result: Any, device: str = "cpu") -> None:
    """Write ``results/NAME.json`` and say where."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    text = {"command": command, "environment": environment(device), "result": result}
    file.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    print(f"written: {file}")
