"""Gradient accumulation: 64 samples per step as a whole, as 8 micro-batches of 8, and as 64 of one.

Three studies of `normkit compare`, of `cnn4` on CIFAR-10, with the same seeds and the same search of learning rates. Whatever
treats each sample by itself computes the same step from any micro-batches, so a few methods are enough where the step is
divided; BatchNorm normalizes each micro-batch on its own. Reports are written to ``runs/accumulation``; the same command
resumes.

    python -m benchmarks.studies.accumulation --data PATH/TO/cifar10
    python -m benchmarks.studies.accumulation --data PATH/TO/cifar10 --budget 100000 --seeds 8

At 50,000 samples a run the three take about 60 core-minutes.
"""

import argparse
from pathlib import Path
from typing import Any

import normkit

METHODS = ["batch", "group", "group+ws", "bnp", "group+bnp", "batchless-projected"]
DIVIDED = ["batch", "group+ws"]
"""Methods where the step is divided into micro-batches."""


def study(micro_batch: int, **options: Any) -> str:
    """Run or resume one study; its table."""
    methods = DIVIDED if micro_batch else METHODS
    name = f"{micro_batch or 'whole'}"
    options["out"] = options["out"] / name
    result = normkit.compare(
        model="cnn4",
        methods=methods,
        batch_sizes=[64],
        micro_batch=micro_batch,
        flip=True,
        channels_last=True,
        margin=0.5,
        quiet=False,
        **options,
    )
    return f"\nmicro-batches: {name}\n{result.table()}"


def main() -> None:
    """Parse, run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: name or folder of the data set")
    parser.add_argument("--budget", type=int, default=50_000, help="samples of one run")
    parser.add_argument("--search-budget", type=float, default=0.2, help="share of these that a run of the search sees")
    parser.add_argument(
        "--validation", type=float, default=3000, help="samples, or share of them, that choose the rates"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr-points", type=int, default=3)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[0, 8, 1], help="sizes; 0 for the whole batch")
    parser.add_argument("--workers", type=int, default=1, help="trials side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/accumulation"))
    options = vars(parser.parse_args())
    sizes = options.pop("micro_batches")
    print(*[study(size, **options) for size in sizes])


if __name__ == "__main__":
    main()
