"""BNP's statistics of convolutions: of patches (the rows that the weights multiply) or of channels, over rates and seeds.

Trains `cnn4` on CIFAR-10 images with the recipes `bnp` and `group+bnp`: SGD, momentum 0.9, one-cycle schedule. Both forms see
the same examples from the same initial weights. Each result is a JSON line, written when its run is done; runs that are in the
file already are skipped, so the command resumes. Runs at the middle rate come first.

    python benchmarks/bnp_statistics.py --data PATH/TO/cifar10 [--methods bnp] [--batches 8] [--examples 20000] [--seeds 3]
    python benchmarks/bnp_statistics.py --table [--store runs/NAME.jsonl]
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F

import normkit
from normkit.study.data.dataset import Data
from normkit.study.data.load import load_data
from normkit.study.models import build_model

FORMS = ("patches", "channels")
METHODS = ("bnp", "group+bnp")
RATES = {128: (0.3, 0.1, 1.0), 8: (0.1, 0.03, 0.3)}  # the middle one first


def train(data: Data, spec: dict[str, Any]) -> dict[str, Any]:
    """Train once; test accuracy in percent, mean loss over the last tenth and largest loss on the way."""
    torch.manual_seed(spec["seed"])
    model = build_model("cnn4", input_shape=data.input_shape, classes=data.classes)
    model, optimizer = normkit.apply(
        spec["method"], model, lr=spec["lr"], momentum=0.9, options={"statistics": spec["statistics"]}
    )
    count = len(data.train.labels)
    order = torch.cat([torch.randperm(count) for _ in range(-(-spec["examples"] // count))])[: spec["examples"]]
    parts = order.split(spec["batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec["lr"], total_steps=len(parts) + 1, cycle_momentum=False
    )
    losses = []
    for part in parts:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.normalise(data.train.inputs[part])), data.train.labels[part])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(data.normalise(part)) for part in data.test.inputs.split(500)])
    right = (logits.argmax(1) == data.test.labels).float().mean().item()
    worst = max(losses) if math.isfinite(losses[-1]) else math.inf
    return {
        **spec,
        "accuracy": round(100 * right, 2),
        "loss": mean(losses[-max(1, len(losses) // 10) :]),
        "worst": worst,
    }


def plan(methods: list[str], batches: list[int], seeds: int, examples: int) -> Iterator[dict[str, Any]]:
    """All runs, those at the middle rates first, the two forms one after the other."""
    for place, seed, method, batch, form in itertools.product(range(3), range(seeds), methods, batches, FORMS):
        yield {
            "method": method,
            "batch": batch,
            "lr": RATES[batch][place],
            "seed": seed,
            "examples": examples,
            "statistics": form,
        }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean accuracy of each form, and the paired difference with its standard error."""
    cells: dict[tuple[Any, ...], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in results:
        cells[r["method"], r["batch"], r["lr"], r["examples"]][r["statistics"]][r["seed"]] = r["accuracy"]
    lines = [
        "| recipe, batch, rate, examples | seeds | patches | channels | patches - channels |",
        "|---|---:|---:|---:|---:|",
    ]
    for (method, batch, lr, examples), forms in sorted(cells.items()):
        both = sorted(forms["patches"].keys() & forms["channels"].keys())
        if both:
            pairs = [[forms[form][seed] for form in FORMS] for seed in both]
            differences = [a - b for a, b in pairs]
            error = f" ± {stdev(differences) / len(both) ** 0.5:.1f}" if len(both) > 1 else ""
            means = " | ".join(f"{mean(column):.1f}" for column in zip(*pairs, strict=True))
            name = f"`{method}`, {batch}, {lr:g}, {examples:,}"
            lines.append(f"| {name} | {len(both)} | {means} | {mean(differences):+.1f}{error} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run what is missing, store, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="name or folder of the data set")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batches", nargs="+", type=int, choices=RATES, default=list(RATES))
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store", type=Path, default=Path("runs/bnp_statistics.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is in the store, and run nothing")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.store.read_text().splitlines()] if args.store.exists() else []
    wanted = plan(args.methods, args.batches, args.seeds, args.examples)
    missing = [spec for spec in wanted if not any(spec.items() <= r.items() for r in done)]
    if missing and not args.table:
        torch.set_num_threads(1)
        data = load_data(args.data, limit=args.examples)
        args.store.parent.mkdir(parents=True, exist_ok=True)
        for spec in missing:
            done.append(train(data, spec))
            with args.store.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(*(f"{k}={v}" for k, v in done[-1].items()), flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
