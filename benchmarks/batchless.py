"""Memory and time of batchless normalization against batch normalization.

Memory: bytes that one forward pass keeps for backward (parameters and inputs not counted), for an effective batch of 128
processed in micro-batches; ResNet-20 on 32x32 and ResNet-50 on 64x64 images, without computing anything (meta tensors). Time:
steps of a network at equal batch, methods in turn within each round, median and quartiles of the paired ratios; on one
thread of a CPU processor time is taken.

    python benchmarks/batchless.py [--quick] [--threads 1] [--rounds 15]                 # ResNet-20 on the CPU
    python benchmarks/batchless.py --device cuda --model resnet50 --size 224 --batch-size 64 --name batchless_gpu
"""

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from common import interleaved, ratio, save, synchronized, timer
from normkit.study.models.build import build_model

METHODS = ("batch", "batchless", "batchless-projected", "batch-renorm", "group", "layer", "none")
NO_AFFINE = "batchless, affine=False"


def converted(method: str, model: nn.Module) -> nn.Module:
    """A copy of ``model`` for the method."""
    if method == NO_AFFINE:
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.affine = False
            norm.register_parameter("weight", None)
            norm.register_parameter("bias", None)
        method = "batchless"
    return model if method == "batch" else normkit.convert(model, method)


def saved_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Bytes of distinct storages kept for backward, without parameters, buffers and inputs; works on meta tensors."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), inputs)}
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs)
        size = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
        del output
    return size


def memory(depth: int, pixels: int) -> list[dict[str, object]]:
    """Bytes per method and micro-batch, and their ratio to batch normalization at 128."""
    table = []
    reference = 0
    for method in ("batch", "batchless", NO_AFFINE, "batchless-projected", "group"):
        model = build_model(f"resnet{depth}", input_shape=(3, pixels, pixels), classes=10)
        model = converted(method, model).to("meta")
        for micro in (128,) if method == "batch" else (128, 8, 1):
            size = saved_bytes(model, torch.empty(micro, 3, pixels, pixels, device="meta"))
            reference = reference or size
            row = {"model": f"resnet{depth}", "pixels": pixels, "method": method, "micro_batch": micro}
            table.append({**row, "megabytes": size / 1e6, "ratio": size / reference})
            print(
                f"resnet{depth} {method:26} micro-batch {micro:4}: {size / 1e6:9.2f} MB, ratio {size / reference:.4f}"
            )
    return table


def time(args: argparse.Namespace, methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    """Step time of each method relative to batch normalization's in the same round."""
    shape = (3, args.size, args.size)
    base = build_model(args.model, input_shape=shape, classes=10).to(args.device)
    x = torch.randn(args.batch_size, *shape, device=args.device)
    labels = torch.randint(0, 10, (args.batch_size,), device=args.device)
    tasks = {}
    for method in methods:
        model, optimizer = normkit.apply(method, copy.deepcopy(base), lr=1e-3)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

        tasks[method] = synchronized(step, args.steps, args.device)
    seconds = interleaved(tasks, args.rounds, timer(args.device))
    result = {}
    for method in methods:
        best = min(seconds[method]) / args.steps
        result[method] = {**ratio(seconds[method], seconds["batch"]), "best_seconds": best}
        print(
            f"{args.model}, batch {args.batch_size}: {method:20}",
            " ".join(f"{k} {v:.3f}" for k, v in result[method].items()),
        )
    return result


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 alone and few rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="per method and round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--name", default="batchless", help="of the file in results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = ((20, 32),) if args.quick else ((20, 32), (50, 64))
    table = [row for depth, pixels in shapes for row in memory(depth, pixels)]
    args.rounds = 3 if args.quick else args.rounds
    command = " ".join(["python benchmarks/batchless.py", *sys.argv[1:]])
    save(args.name, command, {"memory": table, "step": time(args)}, args.device)


if __name__ == "__main__":
    main()
