"""Remeasure the CPU figures of docs/performance.md in one run of six minutes: python benchmarks/cpu.py [--quick].

Each piece is the measurement of one of the other benchmarks, on one thread, short. ``results/cpu.json`` is written after each
piece, so that a run that is interrupted keeps what it has.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

import batchless
import bnp
import memory_traffic
import monitor
import riemannian
import trial_overhead
from common import save

PREPARE = "import sys, time, torch; start = time.process_time(); "
REPORT = "; print(time.process_time() - start)"
METHODS = ("none", "batch", "group", "group+ws", "group+bnp", "bnp", "batchless", "batchless-projected")


def relative(model: str, size: int, batch: int, steps: int, rounds: int, methods: Sequence[str]) -> dict[str, Any]:
    """Step times relative to batch normalization's."""
    args = argparse.Namespace(device="cpu", model=model, size=size, batch_size=batch, steps=steps, rounds=rounds)
    return batchless.time(args, methods)


def step_and_memory(batches: Sequence[int], rounds: int, *, channels_last: bool = False) -> dict[str, Any]:
    """Step time and peak memory on ResNet-20."""
    args = argparse.Namespace(
        device="cpu", size=32, channels_last=channels_last, compile=False, bf16=False, rounds=rounds, seconds=0.15
    )
    return {f"batch {batch}": bnp.measure(args, "resnet20", batch, (*METHODS, "sgd-g")) for batch in batches}


def imports(rounds: int) -> dict[str, float]:
    """Processor seconds, beyond those of ``import torch``, until the package and its whole public face are there."""

    def seconds(statement: str) -> float:
        command = [sys.executable, "-c", PREPARE + statement + REPORT]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    statements = {"import normkit": "import normkit", "normkit.apply": "import normkit; normkit.apply"}
    found = {name: median(seconds(statement) for _ in range(rounds)) for name, statement in statements.items()}
    print(found)
    return found


def optimizer(rounds: int) -> dict[str, Any]:
    """A step of SGD-G and of its rivals on ResNet-20's shapes."""
    rows = riemannian.benchmark("resnet20", "cpu", rounds, 5)
    for name, row in rows.items():
        print(
            f"{name:26}{row['milliseconds']:8.3f} ms, over torch SGD foreach {row['over torch SGD foreach']['median']:.2f}"
        )
    return rows


def overhead(rounds: int) -> list[dict[str, Any]]:
    """The Monitor at its default interval."""
    return [monitor.measure("batch", *case, rounds, "cpu") for case in monitor.CASES[1:]]


def trials(share: int) -> list[dict[str, object]]:
    """A trial over a hand-written loop."""
    cases = (("digits-cnn", 64, 16), ("digits-cnn", 1, 120), ("resnet20", 64, 2))
    rows = [trial_overhead.measure(model, "batch", size, max(1, chunk // share), 1) for model, size, chunk in cases]
    return [*rows, trial_overhead.measure("digits-cnn", "batch", 64, max(1, 16 // share), 1, general=True)]


def pieces(quick: bool) -> dict[str, Callable[[], Any]]:
    """Every piece, the most valuable first."""
    rounds, batches = (1, (1,)) if quick else (15, (1, 2, 8, 16, 128))
    return {
        "step and peak memory, ResNet-20": lambda: step_and_memory(batches, rounds),
        "step and peak memory, ResNet-20, channels last": lambda: step_and_memory(batches, rounds, channels_last=True),
        "memory traffic, ResNet-20, batch 16": lambda: memory_traffic.table("resnet20", 16),
        "step, digits-cnn, batch 1": lambda: relative("digits-cnn", 8, 1, 20, rounds, METHODS),
        "optimizer step, ResNet-20": lambda: optimizer(rounds),
        "monitor": lambda: overhead(1 if quick else 21),
        "import, seconds": lambda: imports(1 if quick else 7),
        "trial over loop": lambda: trials(16 if quick else 1),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round each, to see that everything runs")
    parser.add_argument("--name", default="cpu", help="of the file in results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # measuring without steps is what some of them warn of
    result: dict[str, Any] = {}
    for name, piece in pieces(args.quick).items():
        start = time.perf_counter()
        print(f"\n{name}")
        result[name] = {"found": piece(), "seconds": round(time.perf_counter() - start)}
        save(args.name, "python benchmarks/cpu.py", result)


if __name__ == "__main__":
    main()
