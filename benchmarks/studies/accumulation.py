"""Gradient accumulation: 64 samples per step as a whole, as 8 micro-batches of 8, and as 64 of one.

Three studies of `normkit compare`, of `cnn4` on CIFAR-10, with the same seeds and the same search of learning rates. GroupNorm
and BNP treat a sample alike in every micro-batch; BatchNorm normalizes each micro-batch on its own. Reports are written to
``runs/accumulation``; the same command resumes.

    python -m benchmarks.studies.accumulation --data PATH/TO/cifar10
    python -m benchmarks.studies.accumulation --data PATH/TO/cifar10 --budget 100000 --seeds 8

At 10,000 samples a run the three take about 40 core-minutes.
"""

import argparse
from pathlib import Path
from typing import Any

import normkit

METHODS = ["batch", "group", "bnp", "group+bnp", "batchless", "batchless-projected"]


def study(micro_batch: int, **options: Any) -> str:
    """Run or resume one study; its table."""
    name = f"{micro_batch or 'whole'}"
    options["out"] = options["out"] / name
    result = normkit.compare(
        model="cnn4", methods=METHODS, batch_sizes=[64], micro_batch=micro_batch, flip=True, quiet=False, **options
    )
    return f"\nmicro-batches: {name}\n{result.table()}"


def main() -> None:
    """Parse, run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: name or folder of the data set")
    parser.add_argument("--budget", type=int, default=10_000, help="samples of one run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr-points", type=int, default=5)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[0, 8, 1], help="sizes; 0 for the whole batch")
    parser.add_argument("--workers", type=int, default=1, help="trials side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/accumulation"))
    options = vars(parser.parse_args())
    sizes = options.pop("micro_batches")
    print(*[study(size, **options) for size in sizes])


if __name__ == "__main__":
    main()
