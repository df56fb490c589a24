"""Accuracy at real length: batchless normalization beside batch and group normalization, at every batch size and rate.

One run for each form, batch size, rate and seed: a network on CIFAR-10, random flips, SGD with momentum 0.9, a learning
rate that falls to zero along a cosine. 5,000 training images are held out; choose rates by the accuracy on these. Each
result is one JSON line, written when the run is done; runs that are in the file already are skipped.

    python benchmarks/batchless_length.py --data PATH/TO/cifar10 --forms batch group --batch-size 128 --rates .1 .2
    python benchmarks/batchless_length.py --table
"""

import argparse
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import normkit
from normkit.study.data.load import load_data
from normkit.study.models import build_model

RUNS = Path("runs")
STORE = Path(__file__).parent / "results" / "batchless_length.jsonl"
Splits = dict[str, tuple[Tensor, Tensor]]
Build = Callable[[nn.Module, float, Tensor], tuple[nn.Module, Optimizer]]


def recipe(name: str) -> Build:
    """A form that is a recipe of the package."""
    return lambda model, lr, images: normkit.apply(name, model, lr=lr, batches=[images])


def with_bnp(name: str) -> Build:
    """A recipe's model and optimizer, its gradients preconditioned in addition."""

    def build(model: nn.Module, lr: float, images: Tensor) -> tuple[nn.Module, Optimizer]:
        model, optimizer = normkit.apply(name, model, lr=lr, batches=[images])
        normkit.BNP(model, max_change=0.05).attach(optimizer)
        return model, optimizer

    return build


FORMS: dict[str, Build] = {
    **{name: recipe(name) for name in ("none", "batch", "group", "group+bnp", "batchless", "batchless-projected")},
    "batchless+bnp": with_bnp("batchless"),
    "batchless-projected+bnp": with_bnp("batchless-projected"),
}


def cifar10(path: str) -> Splits:
    """uint8 images and labels, decoded once; ``train`` 45,000, ``validation`` 5,000, ``test`` 10,000."""
    file = RUNS / "cifar10.pt"
    if not file.exists():
        data = load_data(path)
        train, validation = data.split_validation(5_000)
        splits = {"train": train, "validation": validation, "test": data.test}
        file.parent.mkdir(exist_ok=True)
        torch.save({name: (split.inputs, split.labels) for name, split in splits.items()}, file)
    return torch.load(file)


def prepared(images: Tensor) -> Tensor:
    """Images as a network gets them: about mean 0 and variance 1, channels last."""
    return images.float().sub_(120.7).div_(64.1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In per cent."""
    guesses = torch.cat([model(prepared(part)).argmax(1) for part in images.split(100)])
    return 100 * (guesses == labels).float().mean().item()


def run(spec: dict[str, Any], splits: Splits) -> dict[str, Any]:
    """Train once; accuracies in per cent, and the mean training loss over the last tenth of the examples."""
    torch.manual_seed(spec["seed"])
    images, labels = splits["train"]
    examples, size = spec["examples"], spec["batch_size"]
    network = build_model(spec["model"], input_shape=(3, 32, 32), classes=10)
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    order = torch.cat([torch.randperm(len(images)) for _ in range(math.ceil(examples / len(images)))])[:examples]
    flips = torch.rand(examples) < 0.5
    start = time.process_time()
    model, optimizer = FORMS[spec["form"]](network, spec["lr"], prepared(images[order[:512]]))
    steps = math.ceil(examples / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for index, flip in zip(order.split(size), flips.split(size), strict=True):
        batch = images[index]
        batch[flip] = batch[flip].flip(-1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(prepared(batch)), labels[index])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    seconds = time.process_time() - start
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return {
        **spec,
        "validation": accuracy(model, *splits["validation"]),
        "test": accuracy(model, *splits["test"]),
        "train_loss": sum(tail) / len(tail),
        "finite": math.isfinite(losses[-1]),
        "cpu_seconds": round(seconds, 1),
    }


def read(store: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one line for each network, batch size, number of samples and rate, with the mean test accuracy by form."""
    lines: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        lines[r["model"], r["batch_size"], r["examples"], r["lr"]][r["form"]].append(r["test"])
    forms = [form for form in FORMS if any(form in line for line in lines.values())]
    text = ["| network | batch size | samples | rate | " + " | ".join(f"`{form}`" for form in forms) + " |"]
    text += ["|---" + "|---:" * (3 + len(forms)) + "|"]
    for (model, size, examples, rate), line in sorted(
        lines.items(), key=lambda item: (item[0][0], -item[0][1], *item[0][2:])
    ):
        text += [
            f"| {model} | {size} | {examples:,} | {rate:g} | " + " | ".join(_cell(line[form]) for form in forms) + " |"
        ]
    return "\n".join(text)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.1f} ± {deviation:.1f} ({len(values)})"


def main() -> None:
    """Parse, run what is missing, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: name or folder of the data set")
    parser.add_argument("--forms", nargs="+", default=["batch", "group"], choices=FORMS)
    parser.add_argument("--model", default="cnn4")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print what is in the store, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.store)))
        return
    torch.set_num_threads(1)
    splits = cifar10(args.data)
    for seed, lr, form in itertools.product(args.seeds, args.rates, args.forms):
        spec = {
            "model": args.model,
            "form": form,
            "batch_size": args.batch_size,
            "lr": lr,
            "seed": seed,
            "examples": args.examples,
        }
        if any(spec.items() <= done.items() for done in read(args.store)):
            continue
        result = run(spec, splits)
        args.store.parent.mkdir(exist_ok=True)
        with args.store.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()), flush=True)


if __name__ == "__main__":
    main()
