"""Online learning on a stream whose distribution shifts: one image per step, one pass, predictions before each step.

The stream is 19,200 images of CIFAR-10 in four phases: as they are, colours inverted, darkened to 30 %, and as they are again.
`cnn4` starts untrained. For each image the model predicts in eval mode, then takes one step in train mode: SGD, momentum 0.9,
constant rate. Methods that start from data see the first 64 images, without labels.

Rates are half decades around the recipe's rate. They are chosen by the accuracy over a stream of its own (seed 0), by a grid that
is extended by at most three rates on each side until the best one is inside; the streams of the other seeds judge. The order of
the images depends on the seed alone, and all methods see the same stream.

Each run is one JSON line in ``runs/online.jsonl``; the same command resumes. ``--table`` prints, as means over the seeds:

- online accuracy over the whole stream, in per cent, and its difference to that of ``none`` with the 95 % t interval;
- regret: errors in 1,000 images beyond those of the best method of the table;
- for each shift, the accuracy in the last window before and the first after it, and the images until that of a window is back at
  the one before (``-``: not within the phase, for one seed at least). A window is a 32nd of the stream.

    python -m benchmarks.studies.online --data PATH/TO/cifar10
    python -m benchmarks.studies.online --table

About 75 core-minutes. Longer: ``--images 40000``, ``--seeds 8``. ``--methods`` takes any recipe; ``input+`` before it puts an
InputNorm in front.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkit
from benchmarks.studies.cifar10 import RUNS, Splits, cifar10, prepared
from benchmarks.studies.runs import Runs, cell, difference, rate_search, read
from normkit.methods.revisited.input_norm import with_input_norm
from normkit.study.models import build_model

METHODS = ("none", "batch", "group", "group+ws", "bnp", "group+bnp", "batchless", "input+none", "instance")
PHASES, WINDOWS = 4, 32
"""Into how many parts the stream is divided; the accuracy is read in each window."""


def shifted(images: Tensor) -> Tensor:
    """The stream in its four phases; uint8 images ``(N, 3, 32, 32)``."""
    first, inverted, dark, last = images.chunk(PHASES)
    return torch.cat([first, 255 - inverted, (0.3 * dark.float()).to(torch.uint8), last])


def run(spec: dict[str, Any], splits: Splits) -> dict[str, Any]:
    """Learn one stream; ``accuracy`` in per cent, and that in each window."""
    torch.manual_seed(spec["seed"])
    images, labels = splits["train"]
    order = torch.randperm(len(images))[: spec["images"]]
    images, labels = shifted(images[order]), labels[order]
    network = build_model("cnn4", input_shape=(3, 32, 32), classes=10)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    name = spec["method"].removeprefix("input+")
    if name != spec["method"]:
        network = with_input_norm(network)
    model, optimizer = normkit.apply(name, network, lr=spec["lr"], batches=[prepared(images[:64])])
    right = torch.zeros(len(images), dtype=torch.bool)
    finite = True
    for step, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
        batch = prepared(image)
        with torch.no_grad():
            right[step] = model.eval()(batch).argmax() == label
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(batch), label)
        finite = math.isfinite(loss.item())
        if not finite:
            break
        loss.backward()
        optimizer.step()
    accuracy = 100 * right.float()
    windows = [round(part.mean().item(), 2) for part in accuracy.chunk(WINDOWS)]
    return {**spec, "accuracy": round(accuracy.mean().item(), 2), "windows": windows, "finite": finite}


def recovery(result: dict[str, Any], phase: int) -> tuple[float, float, float]:
    """Accuracy in per cent before and after the shift to ``phase``, and images until it is back; nan if it is not."""
    windows, length = result["windows"], WINDOWS // PHASES
    before, after = windows[phase * length - 1], windows[phase * length : (phase + 1) * length]
    back = next((i for i, found in enumerate(after, start=1) if found >= before), math.nan)
    return before, after[0], back * result["images"] / WINDOWS


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one table for each length of the stream."""
    sheets: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        if r["seed"] > 0:
            sheets[r["images"]][r["method"]].append(r)
    text = []
    for images, methods in sorted(sheets.items()):
        by_seed = {name: {r["seed"]: r["accuracy"] for r in runs} for name, runs in methods.items()}
        highest = max(mean(found.values()) for found in by_seed.values())
        text += [f"\n{images:,} images\n"]
        text += [
            "| method | rate | accuracy | to `none` | regret | shift 1 | shift 2 | shift 3 |",
            "|---|" + "---:|" * 7,
        ]
        for name, runs in methods.items():
            shifts = []
            for phase in range(1, PHASES):
                found = [recovery(r, phase) for r in runs]
                before, after, back = (mean(column) for column in zip(*found, strict=True))
                shifts.append(f"{before:.0f} to {after:.0f}, {'-' if math.isnan(back) else f'{back:.0f}'}")
            accuracies = list(by_seed[name].values())
            against = difference(by_seed[name], by_seed.get("none", {})) if name != "none" else "–"
            regret = 10 * (highest - mean(accuracies))
            rate = ", ".join(sorted({f"{r['lr']:g}" for r in runs}))
            text.append(f"| `{name}` | {rate} | {cell(accuracies)} | {against} | {regret:.0f} | {' | '.join(shifts)} |")
    return "\n".join(text)


def main() -> None:
    """Parse, run what is missing, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: name or folder of the data set")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=19_200, help="length of the stream")
    parser.add_argument("--store", type=Path, default=RUNS / "online.jsonl")
    parser.add_argument("--table", action="store_true", help="print what is in the store, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.store)))
        return
    if args.images % WINDOWS:
        parser.error(f"--images {args.images}: give a multiple of {WINDOWS}, so that windows end at the shifts")
    torch.set_num_threads(1)
    splits = cifar10(args.data)
    runs = Runs(args.store, lambda spec: run(spec, splits))
    for method in args.methods:
        spec = {"method": method, "images": args.images}
        recipe = normkit.recipes()[method.removeprefix("input+")]
        centre = recipe.lr * (1 / 64) ** recipe.lr_exponent
        lr = rate_search(centre, lambda lr, spec=spec: runs.result(**spec, lr=lr, seed=0), score)
        for seed in range(1, args.seeds + 1):
            runs.result(**spec, lr=lr, seed=seed)


def score(result: dict[str, Any]) -> tuple[bool, float]:
    """What the rate is chosen by; diverged runs come last."""
    return result["finite"], result["accuracy"]


if __name__ == "__main__":
    main()
