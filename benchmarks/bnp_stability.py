"""Learning rates that batch normalization and BNP survive, with and without the bound on BNP's steps.

Every contender trains the same 5-convolution ReLU network on the same examples, once per learning rate, one-cycle schedule,
SGD with momentum 0.9, one seed; the accuracy is that on held-out examples, and "worst" the largest training loss on the way.

    python benchmarks/bnp_stability.py --data PATH/TO/cifar10 [--batches 128 16] [--quick] [--save NAME]
    python benchmarks/bnp_stability.py --data digits --model digits-cnn
    python benchmarks/bnp_stability.py --data PATH/TO/cifar10 --methods bnp:0.1 bnp:0.2 --batches 128     # other bounds
"""

import argparse
import math
import shlex
import sys
from typing import Any

import torch
import torch.nn.functional as F

import normkit
from common import save
from normkit.study.data.dataset import Data
from normkit.study.data.load import load_data
from normkit.study.models import build_model


def train(data: Data, args: argparse.Namespace, method: str, batch: int, lr: float) -> dict[str, Any]:
    """Train once; accuracy in percent, final and worst loss."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, input_shape=data.input_shape, classes=data.classes)
    name, _, bound = method.partition(":")
    model, optimizer = normkit.apply("none" if bound else name, model, lr=lr, momentum=0.9)
    if bound:
        normkit.BNP(model, max_change=float(bound)).attach(optimizer)
    steps = args.examples // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, cycle_momentum=False)
    order = torch.cat([
        torch.randperm(len(data.train.labels)) for _ in range(-(-args.examples // len(data.train.labels)))
    ])
    worst = 0.0
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.normalise(data.train.inputs[chosen])), data.train.labels[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        worst = max(worst, loss.item()) if math.isfinite(loss.item()) else math.inf
        if worst == math.inf:
            break
    model.eval()
    held = slice(0, args.held_out)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in data.normalise(data.test.inputs[held]).split(250)])
    right = (logits.argmax(1) == data.test.labels[held]).float().mean().item()
    return {"accuracy": round(100 * right, 1), "worst loss": worst}


def main() -> None:
    """Parse, train, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="cnn5")
    parser.add_argument("--methods", nargs="+", default=["batch", "bnp-paper", "bnp"])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 16])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two rates, one batch size, few examples")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rates, args.examples = args.batches[:1], [0.1, 1.0], 1280
    torch.set_num_threads(args.threads)
    data = load_data(args.data)
    results: dict[str, dict[str, Any]] = {}
    for batch in args.batches:
        print(f"\nbatch {batch}: accuracy (largest loss on the way)")
        print(f"{'':>12}" + "".join(f"{'lr ' + format(lr, 'g'):>18}" for lr in args.rates))
        for method in args.methods:
            row = {f"{lr:g}": train(data, args, method, batch, lr) for lr in args.rates}
            results[f"{method}, batch {batch}"] = row
            cells = (f"{r['accuracy']:5.1f} ({r['worst loss']:.3g})" for r in row.values())
            print(f"{method:>12}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    if args.save:
        save(args.save, shlex.join(["python", *sys.argv]), results)


if __name__ == "__main__":
    main()
