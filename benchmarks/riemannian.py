"""Time and number of operations of one optimizer step over the parameter shapes of ResNet-50 or ResNet-20.

Every contender steps in turn, again and again, so that what disturbs the machine disturbs all of them; ratios are taken
within each round and their median and quartiles reported. Convolution weights are on the sphere where the optimizer knows
one (ours, geoopt); all other parameters follow ordinary SGD or Adam. On one thread of a CPU processor time is taken.

    python benchmarks/riemannian.py [--shapes resnet50 resnet20] [--device cpu] [--quick] [--save NAME]
"""

import argparse
import contextlib
import importlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import ratio, save, timer
from normkit import SGDG, AdamG


def resnet50() -> Iterator[tuple[int, ...]]:
    """Parameter shapes of ResNet-50 for 1000 classes.

    Yields:
        One shape per parameter.
    """

    def conv(filters: int, inputs: int, size: int) -> Iterator[tuple[int, ...]]:
        yield (filters, inputs, size, size)
        yield from ((filters,), (filters,))  # scale and shift of the normalization behind it

    yield from conv(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from (*conv(width, inputs, 1), *conv(width, width, 3), *conv(4 * width, width, 1))
            if block == 0:
                yield from conv(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, 2048), (1000,))


def resnet20() -> Iterator[tuple[int, ...]]:
    """Parameter shapes of the 20-layer ResNet for CIFAR-10, its shortcuts free of parameters.

    Yields:
        One shape per parameter.
    """
    inputs = 3
    for width, layers in ((16, 7), (32, 6), (64, 6)):
        for _ in range(layers):
            yield from ((width, inputs, 3, 3), (width,), (width,))
            inputs = width
    yield from ((10, 64), (10,))


SHAPES = {"resnet50": resnet50, "resnet20": resnet20}


def parameters(shapes: str, device: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Convolution weights and all others, with gradients."""
    generator = torch.Generator().manual_seed(0)
    everything = []
    for shape in SHAPES[shapes]():
        p = nn.Parameter(torch.randn(shape, generator=generator).to(device))
        p.grad = 1e-3 * torch.randn(shape, generator=generator).to(device)
        everything.append(p)
    return [p for p in everything if p.ndim == 4], [p for p in everything if p.ndim != 4]


def _module(name: str) -> Any:
    """A package, or None where it is not installed."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
    return None


def contenders(shapes: str, device: str) -> dict[str, torch.optim.Optimizer]:
    """Each optimizer with parameters of its own; others' only where they are installed."""
    geoopt, adamp = (_module(name) for name in ("geoopt", "adamp"))

    def ours(rule: Any, **options: Any) -> torch.optim.Optimizer:
        weights, rest = parameters(shapes, device)
        return rule([{"params": weights, "manifold": True}, {"params": rest, "lr": 0.01}], **options)

    def plain(rule: Any, **options: Any) -> torch.optim.Optimizer:
        weights, rest = parameters(shapes, device)
        return rule(weights + rest, **options)

    def spherical(rule: Any, **options: Any) -> torch.optim.Optimizer:
        weights, rest = parameters(shapes, device)
        on_sphere = []
        for p in weights:
            rows = p.detach().flatten(1)
            q = geoopt.ManifoldParameter(rows / rows.norm(dim=1, keepdim=True), manifold=geoopt.Sphere())
            q.grad = p.grad.flatten(1).contiguous() if p.grad is not None else None
            on_sphere.append(q)
        return rule(on_sphere + rest, **options)

    sgd = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
    table: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "torch SGD foreach": lambda: plain(torch.optim.SGD, foreach=True, **sgd),
        "torch SGD loop": lambda: plain(torch.optim.SGD, foreach=False, **sgd),
        "torch Adam foreach": lambda: plain(torch.optim.Adam, foreach=True),
        "SGDG": lambda: ours(SGDG, orthogonality=0.0),
        "AdamG": lambda: ours(AdamG, orthogonality=0.0),
        "SGDG readable loop": lambda: ours(SGDG, orthogonality=0.0, foreach=False),
        "SGDG, orthogonality 0.1": lambda: ours(SGDG),
    }
    if geoopt:
        table["geoopt RiemannianSGD"] = lambda: spherical(
            geoopt.optim.RiemannianSGD, lr=0.01, momentum=0.9, nesterov=True
        )
        table["geoopt RiemannianAdam"] = lambda: spherical(geoopt.optim.RiemannianAdam, lr=0.01)
    if adamp:  # of the authors of SGDP and AdamP
        table |= {"SGDP": lambda: plain(adamp.SGDP, **sgd), "AdamP": lambda: plain(adamp.AdamP, lr=0.001)}
    if device == "cuda":
        table["torch SGD fused"] = lambda: plain(torch.optim.SGD, fused=True, **sgd)
        table["SGDG foreach"] = lambda: ours(SGDG, orthogonality=0.0, fused=False)
    return {name: make() for name, make in table.items()}


class Counter(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(optimizer: torch.optim.Optimizer) -> int:
    """Operations of one step."""
    with Counter() as counter:
        optimizer.step()
    return counter.count


def seconds(optimizer: torch.optim.Optimizer, device: str, repeats: int) -> float:
    """Seconds of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    now = timer(device)
    start = now()
    for _ in range(repeats):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / repeats


def benchmark(shapes: str, device: str, rounds: int, repeats: int) -> dict[str, dict[str, Any]]:
    """All contenders in turn, ``rounds`` times."""
    optimizers = contenders(shapes, device)
    counts = {name: operations(optimizer) for name, optimizer in optimizers.items()}
    for optimizer in optimizers.values():
        seconds(optimizer, device, 2)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer, device, repeats))
    rows = {}
    for name, series in times.items():
        row: dict[str, Any] = {"milliseconds": 1e3 * statistics.median(series), "operations": counts[name]}
        for reference in ("torch SGD foreach", "SGDG", "AdamG"):
            row[f"over {reference}"] = ratio(series, times[reference])
        rows[name] = row
    return rows


def main() -> None:
    """Run, print a table, and store JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"device": options.device, "threads": options.threads}
    for shapes in options.shapes:
        rounds, repeats = (5 if options.quick else 20), (1 if shapes == "resnet50" else 10)
        rows = results[shapes] = benchmark(shapes, options.device, rounds, repeats)
        print(f"\n{shapes}, {options.device}, {options.threads} threads: median [quartiles] over {rounds} rounds")
        print(f"{'':26}{'ms':>9}{'operations':>12}   over torch SGD foreach   over SGDG")
        for name, row in rows.items():
            over = row["over torch SGD foreach"], row["over SGDG"]
            ratios = [f"{x['median']:6.2f} [{x['low']:.2f}, {x['high']:.2f}]" for x in over]
            print(f"{name:26}{row['milliseconds']:9.3f}{row['operations']:12}   {ratios[0]:22}   {ratios[1]}")
    if options.save:
        save(options.save, " ".join(sys.argv), results, options.device)


if __name__ == "__main__":
    main()
