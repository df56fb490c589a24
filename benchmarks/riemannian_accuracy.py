"""SGD-G and Adam-G against SGD and AdamP at equal tuning budget: the same runs, grids of the same size, the same seeds.

Each contender gets one run per learning rate of its own grid, judged on the validation split; the best rate then trains with
several seeds, judged once on the test split. Data, augmentation, schedule (cosine), batch size and initial weights are the
same; weights (not norms, not biases) decay at the same rate wherever they are not on the sphere.

    python benchmarks/riemannian_accuracy.py [--data digits] [--model digits-cnn] [--budget 6000] [--device cpu] [--quick]
"""

import argparse
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from common import save
from normkit import SGDG, AdamG, param_groups
from normkit.study.config import StudyConfig
from normkit.study.load import load
from normkit.study.records import TrialKey
from normkit.study.task import Task
from normkit.study.train.loop import Diverged, Loop, evaluate

DECAY = 5e-4
Build = Callable[[nn.Module, float], Optimizer]


def adamp(model: nn.Module, lr: float) -> Optimizer:
    """AdamP (arXiv 2006.08217) in its authors' package, with its defaults."""
    from adamp import AdamP

    return AdamP(param_groups(model, lr=lr, weight_decay=DECAY), lr=lr)


def on_sphere(rule: Any, divisor: float, which: str = "exact", **options: Any) -> Build:
    """SGD-G or Adam-G; the rate is the manifold's, the other weights' smaller by ``divisor``, as in the paper."""

    def build(model: nn.Module, lr: float) -> Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the paper's rule changes the function of the network
            groups = param_groups(model, lr=lr / divisor, weight_decay=DECAY, manifold_lr=lr, rule=which)  # type: ignore
        return rule(groups, **options)

    return build


CONTENDERS: dict[str, tuple[float, Build]] = {
    "SGD": (
        0.1,
        lambda model, lr: SGD(param_groups(model, lr=lr, weight_decay=DECAY), lr=lr, momentum=0.9, nesterov=True),
    ),
    "AdamP": (0.01, adamp),
    "SGD-G": (0.2, on_sphere(SGDG, 20)),
    "Adam-G": (0.05, on_sphere(AdamG, 5)),
    "SGD-G, no orthogonality": (0.2, on_sphere(SGDG, 20, orthogonality=0.0)),
    "SGD-G, the paper's rule": (0.2, on_sphere(SGDG, 20, "paper")),
    "Adam-G, the paper's rule": (0.05, on_sphere(AdamG, 5, "paper")),
}


def accuracy(config: StudyConfig, task: Task, build: Build, lr: float, seed: int, *, final: bool) -> float:
    """Accuracy of one run, on the test split for final runs; a diverged run counts as 0."""
    torch.manual_seed(seed)
    model = task.model().to(config.device)
    key = TrialKey("final" if final else "search", "", config.batch_sizes[0], lr, seed)
    loop = Loop(config, key, task, model, build(model, lr))
    try:
        for _ in loop.points():
            pass
    except Diverged:
        return 0.0
    value, loss = evaluate(model, task, "test" if final else "validation", config)
    return value if loss is not None and math.isfinite(loss) else 0.0


def main() -> None:
    """Run all contenders, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--budget", type=int, default=6000, help="training examples per run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rates", type=int, default=5, help="learning rates per contender, a factor sqrt(10) apart")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="at most this many examples of each split")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--crop", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="small budget, three rates, two seeds")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    if options.quick:
        options.budget, options.rates, options.seeds = 1500, 3, 2
    torch.set_num_threads(1)
    config = StudyConfig(
        data=options.data,
        model=options.model,
        methods=("batch",),
        batch_sizes=(options.batch_size,),
        budget=options.budget,
        device=options.device,
        limit=options.limit,
    )
    config = replace(config, flip=options.flip, crop=options.crop)
    task = load(config)
    table: dict[str, Any] = {}
    print(f"{options.model} on {options.data}, {options.budget} examples a run, {options.seeds} seeds: test accuracy")
    for name in options.only:
        centre, build = CONTENDERS[name]
        grid = [centre * 10 ** ((k - options.rates // 2) / 2) for k in range(options.rates)]
        search = {lr: accuracy(config, task, build, lr, 0, final=False) for lr in grid}
        best = max(search, key=search.__getitem__)
        final = [accuracy(config, task, build, best, seed, final=True) for seed in range(1, options.seeds + 1)]
        edge = best in (grid[0], grid[-1])
        table[name] = {"search": search, "lr": best, "at the edge of the grid": edge, "test": final}
        spread = f"{statistics.mean(final):.4f} +- {statistics.stdev(final):.4f}"
        print(f"{name:26} lr {best:<7.3g}{' (edge)' if edge else '':8}{spread}", flush=True)
    if options.save:
        result = {"options": {k: v for k, v in asdict(config).items() if k != "data"}, "table": table}
        command = " ".join(word if word != options.data or word == "digits" else "PATH" for word in sys.argv)
        save(options.save, command, result, options.device)


if __name__ == "__main__":
    main()
