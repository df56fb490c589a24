"""Accuracy after few examples: batchless normalization, paper's and projected gradient, against its neighbours.

A net of five small convolutions, or ResNet-20, on CIFAR-10; every method at every learning rate and batch size, one line per
run, with the accuracy on training images that no run trains on (choose rates by these) and on test images.

    python benchmarks/batchless_projected.py --data PATH/TO/cifar10 [--model resnet20] [--methods ...] [--lrs ...]
"""

import argparse
import itertools
import sys
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from common import save
from normkit.methods.batchless import fit as batchless_step
from normkit.methods.batchless import projected as batchless_projected
from normkit.methods.batchless import training as batchless_training
from normkit.methods.batchless.layer import batchless_layers
from normkit.study.data.load import load_data
from normkit.study.models import build_model


def network(model: str) -> nn.Module:
    """ResNet-20, or five 3x3 convolutions of 16, 32, 32, 64, 64 channels, batch normalization and ReLU after each."""
    if model == "resnet20":
        resnet = build_model(model, input_shape=(3, 32, 32), classes=10)
        return resnet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 2), (16, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def run(
    method: str,
    lr: float,
    batch_size: int,
    seed: int,
    budget: int,
    splits: dict[str, tuple[Tensor, Tensor]],
    optimizer: str,
    network_name: str,
) -> dict[str, float | str]:
    """One training run; accuracy in per cent, the mean training loss over its last fifth, mean log sigma at the end."""
    torch.manual_seed(seed)
    x, labels = splits["train"]
    start = process_time()
    model, stepped = normkit.apply(method, network(network_name), lr=lr, batches=[x[:256]], optimizer=optimizer)
    order = torch.cat([torch.randperm(len(x)) for _ in range(1 + budget // len(x))])[:budget]
    losses = []
    for index in order.split(batch_size):
        stepped.zero_grad()
        loss = F.cross_entropy(model(x[index]), labels[index])
        loss.backward()
        stepped.step()
        losses.append(loss.item())
        if not loss.isfinite():
            break
    model.eval()
    tail = losses[-max(1, len(losses) // 5) :]
    layers = batchless_layers(model)
    return {
        "model": network_name,
        "method": method,
        "optimizer": optimizer,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "examples": budget,
        "validation": accuracy(model, *splits["validation"]),
        "accuracy": accuracy(model, *splits["test"]),
        "train_loss": sum(tail) / len(tail),
        "log_sigma": sum(layer.sigma.log().mean().item() for layer in layers) / max(1, len(layers)),
        "cpu_seconds": process_time() - start,
    }


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """In per cent."""
    guesses = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return 100 * (guesses == labels).float().mean().item()


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="cnn", choices=["cnn", "resnet20"])
    parser.add_argument("--methods", nargs="+", default=["batch", "group", "batchless", "batchless-projected"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--examples", type=int, default=4_000)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument(
        "--gains",
        nargs="+",
        type=float,
        default=[batchless_projected.GAIN],
        help="largest share of the newest step in A and B",
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["weights", "slopes", "restraint"], help="leave out a part"
    )
    parser.add_argument("--name", default="batchless_projected", help="of the file in results/")
    parser.add_argument("--quick", action="store_true", help="a tenth of the examples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "weights" in args.without:
        batchless_training.feeding_layers = lambda model: []
    if "slopes" in args.without:
        batchless_step.gain = torch.zeros_like
    if "restraint" in args.without:
        batchless_training.clip_by_trust_ratio = lambda *_: None
    data = load_data(args.data)
    parts = {
        "train": (data.train, 0, 20_000),
        "validation": (data.train, 20_000, 22_000),
        "test": (data.test, 0, 2_000),
    }
    splits = {name: (data.normalise(split.inputs[a:b]), split.labels[a:b]) for name, (split, a, b) in parts.items()}
    budget = args.examples // (10 if args.quick else 1)
    results = []
    for batch_size in args.batch_sizes:
        for lr in args.lrs:
            for gain, method, seed in itertools.product(args.gains, args.methods, args.seeds):
                batchless_projected.GAIN = gain
                result = run(method, lr, batch_size, seed, budget, splits, args.optimizer, args.model)
                results.append(result | {"gain": gain})
                cells = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in results[-1].items())
                print(*cells, flush=True)
    given = " ".join(sys.argv[1:]).replace(args.data, "PATH/TO/cifar10")
    save(args.name, f"python benchmarks/batchless_projected.py {given}", results)


if __name__ == "__main__":
    main()
