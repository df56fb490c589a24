"""Bytes that a training step moves through memory beside its convolutions and matrix products, method by method.

Counted, not timed: an operation of torch reads its inputs and writes its outputs once; of the fused normalizations ``passes``
says how often. The traffic of a method is what its step moves beyond that of the same network without normalization. The forward
and the backward pass are given in units of A, the bytes of all normalized activations, the optimizer's step in units of P, the
bytes of all parameters. Beside them stands the number of operations of a whole step, views included. Triton kernels are no
operations of torch; their traffic stands in docs/performance.md.

    python benchmarks/memory_traffic.py [--model resnet20] [--batch-size 16]
"""

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normkit
from common import save
from normkit.study.models import build_model

METHODS = ("none", "batch", "group", "batchless", "batchless-projected", "bnp", "sgd-g")
OVERWRITES = ("copy", "fill", "zero")
PRODUCTS = ("convolution", "addmm", "mm", "bmm")


def passes(name: str, args: tuple[Any, ...]) -> float | None:
    """How often a fused normalization moves its whole input or output through memory; None for other operations."""
    if name == "native_batch_norm":
        return 3 if args[5] else 2  # training reads x once more, for mean and variance
    if name == "native_batch_norm_backward":
        training, (needs_dx, *sums) = args[7], args[9]
        both = 1 if args[0] is args[1] else 2
        return both * (training or any(sums)) + (2 + training) * needs_dx
    return {"native_group_norm": 3, "native_group_norm_backward": 5}.get(name)


class Traffic(TorchDispatchMode):
    """Adds up bytes read and written, and counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(PRODUCTS):
            return result
        fused = passes(name, args)
        if fused is not None:
            self.bytes += int(fused * args[0].nbytes)
        else:
            read = args[1:] if name.strip("_").removeprefix("foreach_") in OVERWRITES else args
            read = read, {key: value for key, value in (kwargs or {}).items() if key != "out"}
            written = args[0] if result is None else result  # _foreach_mul_ and its like return nothing
            tensors = (t for t in (*tree_leaves(read), *tree_leaves(written)) if isinstance(t, Tensor))
            self.bytes += sum(t.nbytes for t in tensors)
        return result


def traffic(method: str, model: str, batch: int) -> tuple[int, int, int]:
    """Bytes of the forward and backward pass and of the optimizer's step; operations of all of it."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    network, optimizer = normkit.apply(
        method, build_model(model, input_shape=(3, 32, 32), classes=10), lr=1e-3, batches=[x]
    )
    for _ in range(2):  # the first step sets things up
        optimizer.zero_grad()
        with Traffic() as passes:
            F.cross_entropy(network(x), y).backward()
        with Traffic() as step:
            optimizer.step()
    return passes.bytes, step.bytes, passes.operations + step.operations


def normalized(model: str, batch: int) -> tuple[int, int]:
    """A and P: bytes of all inputs of batch normalization layers, and of all parameters."""
    network, sizes = build_model(model, input_shape=(3, 32, 32), classes=10), []
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda _, args, __: sizes.append(args[0].nbytes))
    network(torch.randn(batch, 3, 32, 32))
    return sum(sizes), sum(p.nbytes for p in network.parameters())


def table(model: str, batch: int) -> dict[str, Any]:
    """The traffic of every method beyond that of ``none``, printed and as a table."""
    a, p = normalized(model, batch)
    found = {method: traffic(method, model, batch) for method in METHODS}
    passes, step, operations = found["none"]
    rows = {
        m: {"passes_A": (f - passes) / a, "step_P": (s - step) / p, "operations": n - operations}
        for m, (f, s, n) in found.items()
    }
    for method, row in rows.items():
        print(
            f"{method:20} forward and backward {row['passes_A']:6.2f} A   step {row['step_P']:6.2f} P   "
            f"{row['operations']:+5d} operations"
        )
    none = {"passes_bytes": passes, "step_bytes": step, "operations": operations}
    return {"A_bytes": a, "P_bytes": p, "none": none, "beyond_none": rows}


def main() -> None:
    """Count, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--name", default="memory_traffic", help="of the file in results/")
    args = parser.parse_args()
    result = table(args.model, args.batch_size)
    save(args.name, " ".join(["python benchmarks/memory_traffic.py", *sys.argv[1:]]), result)


if __name__ == "__main__":
    main()
