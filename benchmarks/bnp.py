"""Step time and peak memory of BNP and its rivals, relative to the network without normalization and to batch normalization.

Every contender trains in turn, round after round, so that what disturbs the machine disturbs all of them; ratios are taken
within each round and their median and quartiles reported. On one thread of a CPU processor time is taken.

    python benchmarks/bnp.py                                   # ResNet-20 shapes on the CPU, batch 128 and 8
    python benchmarks/bnp.py --device cuda --models resnet18 resnet50 --size 224 --bf16 --channels-last [--compile]
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import normkit
from common import interleaved, ratio, save, synchronized, timer
from normkit.study.models import build_model

CONTENDERS = ("none", "batch", "bnp", "bnp-paper", "observing")
"""Recipes, and ``observing``: the hooks of BNP without its step, to see where the time goes."""


def trainer(name: str, args: argparse.Namespace, model_name: str, batch: int) -> Callable[[], None]:
    """One training step of a contender, as a function."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = build_model(model_name, input_shape=(3, args.size, args.size), classes=10)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    model, optimizer = normkit.apply("none" if name == "observing" else name, model, lr=1e-4, momentum=0.9)
    observer = normkit.BNP(model) if name == "observing" else None
    forward = torch.compile(model) if args.compile else model
    x = torch.randn(batch, 3, args.size, args.size, device=device).to(memory_format=layout)
    y = torch.randint(10, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext():
            loss = F.cross_entropy(forward(x).float(), y)
        loss.backward()
        optimizer.step()
        if observer is not None:
            observer.discard()

    return step


def peak_memory(step: Callable[[], None], device: str) -> int:
    """Largest number of bytes allocated during one step, over what was allocated before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocated = peak = 0
    profiled: Any = profiler.profiler  # torch's stubs do not know what its events hold
    for event in sorted(profiled.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def measure(
    args: argparse.Namespace, model_name: str, batch: int, contenders: Sequence[str] = CONTENDERS
) -> dict[str, Any]:
    """Ratios of the contenders, ``none`` first, for one model and batch size."""
    steps = {name: trainer(name, args, model_name, batch) for name in contenders}
    for step in steps.values():
        step()
        step()
    now = timer(args.device)
    start = now()
    synchronized(steps["none"], 1, args.device)()
    repeat = max(1, round(args.seconds / (now() - start)))
    seconds = interleaved({n: synchronized(s, repeat, args.device) for n, s in steps.items()}, args.rounds, now)
    memory = {name: peak_memory(step, args.device) for name, step in steps.items()}
    result: dict[str, Any] = {"seconds per step": {n: min(t) / repeat for n, t in seconds.items()}}
    for below in ("none", "batch"):
        result[f"time relative to {below}"] = {n: ratio(t, seconds[below]) for n, t in seconds.items() if n != below}
        result[f"memory relative to {below}"] = {n: m / memory[below] for n, m in memory.items() if n != below}
    print(f"\n{model_name}, batch {batch}, {args.device}{', compiled' if args.compile else ''}")
    print(f"{'':>20} {'time/none':>22} {'time/batch':>11} {'memory/none':>12}")
    for name in contenders[1:]:
        t = result["time relative to none"][name]
        over = "" if name == "batch" else f"{result['time relative to batch'][name]['median']:11.3f}"
        spread = f"{t['median']:8.3f} [{t['low']:.3f}, {t['high']:.3f}]"
        print(f"{name:>20} {spread:>22} {over:>11} {result['memory relative to none'][name]:12.3f}")
    return result


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["resnet20"])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 8])
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.5, help="per contender and round")
    parser.add_argument("--quick", action="store_true", help="three rounds at batch 8")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds, args.seconds = [8], 3, 0.1
    torch.set_num_threads(args.threads)
    results = {f"{model}, batch {b}": measure(args, model, b) for model in args.models for b in args.batches}
    if args.save:
        save(args.save, shlex.join(["python", *sys.argv]), results, args.device)


if __name__ == "__main__":
    main()
