"""Fine-tuning a trained BatchNorm network at batch sizes 1, 2 and 4: which normalization keeps what it has learned?

`cnn4` is trained with BatchNorm on the classes 0 to 4 of CIFAR-10 (200,000 samples, batch size 128); its weights are cached.
Then it is moved to a target:

- ``classes``: the other five classes, with a new last layer.
- ``colours``: the classes 0 to 4, colours inverted, contrast reduced to 60 %, noise of deviation 15 of 255 added.

Each method starts from the same trained network; none sees data of the target before its first step. ``batch-renorm`` has its
final bounds from the first step on, as its schedule counts the steps of the first training. At batch size 1, ``batch`` trains
with the statistics of one image, as ``instance`` does, and is judged with running statistics. ``fold+bnp`` merges the BatchNorm
layers into the convolutions and preconditions what is left; ``fold+none`` is plain SGD on the merged network.

One run trains on 5,000 samples with SGD, momentum 0.9, and a learning rate that falls to zero along a cosine.

Rates are half decades around a tenth of the recipe's rate. The search runs one seed at three rates, and extends the grid by at
most three rates on each side until the best one is inside. The best has the highest validation accuracy at the end of the run;
it then runs with all seeds. A table marks a rate at the edge of its grid.

Each run is one JSON line in ``runs/fine_tuning.jsonl``, written when it ends; the same command resumes. Accuracies are in per
cent, of the target's test images: at the start, at the end, and of the weights with the best validation accuracy at five
points of the run.

    python -m benchmarks.studies.fine_tuning --data PATH/TO/cifar10
    python -m benchmarks.studies.fine_tuning --table

One target takes about 30 core-minutes; start the other target as a second process, with ``--target classes``. Longer:
``--examples 20000``, ``--seeds 8``.
"""

import argparse
import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import normkit
from benchmarks.studies.cifar10 import RUNS, Splits, accuracy, cifar10, prepared
from benchmarks.studies.runs import Runs, best, cell, difference, rate_search, read
from normkit.study.models import build_model

METHODS = ("batch", "frozen", "batch-renorm", "instance", "group", "batchless", "fold+none", "fold+bnp", "group+bnp")
TARGETS = ("colours", "classes")
PARTS = 5


def five_classes(splits: Splits, first: int) -> Splits:
    """The images of the classes ``first`` to ``first + 4``, relabelled 0 to 4."""
    found = {}
    for name, (images, labels) in splits.items():
        ours = (labels >= first) & (labels < first + 5)
        found[name] = images[ours], labels[ours] - first
    return found


def recoloured(splits: Splits) -> Splits:
    """Inverted colours, 60 % of the contrast, noise; uint8 like the originals."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (images, labels) in splits.items():
        noise = torch.empty_like(images, dtype=torch.float32).normal_(0, 15, generator=generator)
        changed = noise.add_(127.5).add_(127.5 - images.float(), alpha=0.6)
        found[name] = changed.clamp_(0, 255).round_().to(torch.uint8), labels
    return found


def train(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, *, examples: int, batch_size: int
) -> Iterator[bool]:
    """Train, and yield after each of ``PARTS`` equal parts of the run whether the loss is finite; end when it is not."""
    order = torch.cat([torch.randperm(len(images)) for _ in range(math.ceil(examples / len(images)))])[:examples]
    flips = torch.rand(examples) < 0.5
    steps = math.ceil(examples / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stops = {round(steps * part / PARTS) for part in range(1, PARTS + 1)}
    for step, (index, flip) in enumerate(zip(order.split(batch_size), flips.split(batch_size), strict=True), start=1):
        batch = images[index]
        batch[flip] = batch[flip].flip(-1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(prepared(batch)), labels[index])
        if not loss.isfinite():
            yield False
            return
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in stops:
            yield True


def pretrained(splits: Splits, examples: int, file: Path) -> nn.Sequential:
    """The network with BatchNorm, trained on ``splits``; from ``file`` if it is there."""
    torch.manual_seed(0)
    model = build_model("cnn4", input_shape=(3, 32, 32), classes=5)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if not file.exists():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in train(model, optimizer, *splits["train"], examples=examples, batch_size=128):
            pass
        print(f"pretrained: {accuracy(model.eval(), *splits['test']):.1f} % on its own test images", flush=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return cast("nn.Sequential", model.train())


def with_method(method: str, network: nn.Module, lr: float) -> tuple[nn.Module, Optimizer]:
    """The trained network and the optimizer as the method wants them; ``fold+`` merges the BatchNorm layers first."""
    if method.startswith("fold+"):
        network = normkit.fold(network).train()
    return normkit.apply(method.removeprefix("fold+"), network, lr=lr)


def run(spec: dict[str, Any], network: nn.Sequential, splits: Splits) -> dict[str, Any]:
    """Fine-tune once; accuracies in per cent."""
    torch.manual_seed(spec["seed"])
    network = copy.deepcopy(network)
    if spec["target"] == "classes":
        network[-1].reset_parameters()
    model, optimizer = with_method(spec["method"], network, spec["lr"])

    def measured(split: str) -> float:
        model.eval()
        found = accuracy(model, *splits[split])
        model.train()
        return round(found, 2)

    result = {**spec, "start": measured("test"), "validation": [measured("validation")]}
    best_weights = copy.deepcopy(model.state_dict())
    sizes = {"examples": spec["examples"], "batch_size": spec["batch_size"]}
    for finite in train(model, optimizer, *splits["train"], **sizes):
        result["finite"] = finite
        result["validation"].append(measured("validation"))
        if result["validation"][-1] > max(result["validation"][:-1]):
            best_weights = copy.deepcopy(model.state_dict())
    result["end"] = measured("test")
    model.load_state_dict(best_weights)
    return {**result, "best": measured("test")}


def score(result: dict[str, Any]) -> tuple[bool, float]:
    """What the rate is chosen by: the validation accuracy at the end; diverged runs come last."""
    return result["finite"], result["validation"][-1]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one table for each target, batch size and number of samples; mean ± deviation over the seeds (their number).

    The rate of a row is that which the search chose. The last column compares the best weights with those of ``frozen``: the
    mean difference over the seeds that both ran, with its 95 % t interval.
    """
    sheets: dict[tuple[Any, ...], dict[str, dict[float, list[dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for r in results:
        sheets[r["target"], r["batch_size"], r["examples"]][r["method"]][r["lr"]].append(r)
    text = []
    for (target, size, examples), methods in sorted(sheets.items()):
        text += [f"\n{target}, batch size {size}, {examples:,} samples\n"]
        text += ["| method | rate | start | best | end | best, to `frozen` |", "|---|---|---|---|---|---|"]
        chosen = {
            method: best({lr: run for lr, runs in rates.items() for run in runs if run["seed"] == 0}, score)
            for method, rates in methods.items()
        }
        by_seed = {method: {r["seed"]: r["best"] for r in methods[method][lr]} for method, lr in chosen.items()}
        for method in sorted(methods, key=METHODS.index):
            rates, lr = methods[method], chosen[method]
            edge = " (edge)" if lr in (min(rates), max(rates)) else ""
            cells = [cell([r[name] for r in rates[lr]]) for name in ("start", "best", "end")]
            against = difference(by_seed[method], by_seed.get("frozen", {}))
            text.append(f"| `{method}` | {lr:g}{edge} | {' | '.join(cells)} | {against} |")
    return "\n".join(text)


def main() -> None:
    """Parse, run what is missing, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: name or folder of the data set")
    parser.add_argument("--target", choices=TARGETS, default="colours")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=5_000, help="samples of one run")
    parser.add_argument("--pretrain", type=int, default=200_000, help="samples of the training before")
    parser.add_argument("--store", type=Path, default=RUNS / "fine_tuning.jsonl")
    parser.add_argument("--table", action="store_true", help="print what is in the store, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.store)))
        return
    torch.set_num_threads(1)
    args.store.parent.mkdir(exist_ok=True)
    splits = cifar10(args.data)
    own = five_classes(splits, 0)
    target = recoloured(own) if args.target == "colours" else five_classes(splits, 5)
    network = pretrained(own, args.pretrain, args.store.with_name(f"{args.store.stem}-{args.pretrain}.pt"))
    runs = Runs(args.store, lambda spec: run(spec, network, target))
    for batch_size in args.batch_sizes:
        for method in args.methods:
            spec = {
                "target": args.target,
                "method": method,
                "batch_size": batch_size,
                "examples": args.examples,
                "pretrain": args.pretrain,
            }
            recipe = normkit.recipes()[method.removeprefix("fold+")]
            centre = recipe.lr * (batch_size / 64) ** recipe.lr_exponent / 10
            lr = rate_search(centre, lambda lr, spec=spec: runs.result(**spec, lr=lr, seed=0), score)
            for seed in range(args.seeds):
                runs.result(**spec, lr=lr, seed=seed)


if __name__ == "__main__":
    main()
