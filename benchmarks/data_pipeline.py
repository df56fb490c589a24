"""Share of a ResNet-20 step that the data pipeline takes: python benchmarks/data_pipeline.py [--quick] [--threads 2].

The pipeline is everything between the stored uint8 images and the model: order, gather, flip, reflect-pad-and-crop,
normalisation. The images are random, 32x32x3 and as many as CIFAR-10 has; their content does not matter for the time.
"""

import argparse

import torch

import normkit
from common import interleaved, ratio, save
from normkit.study.config import Training
from normkit.study.data.augmentation import Augmentation
from normkit.study.data.batches import batches
from normkit.study.data.dataset import Split, TensorSamples, make_data
from normkit.study.models import build_model
from normkit.study.task import classification_loss
from normkit.study.train.loop import LossOf, training_step


def measure(batch_size: int, steps: int, rounds: int) -> dict[str, object]:
    """Paired times of ``steps`` batches: made, and trained on."""
    inputs = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    split = Split(inputs, torch.arange(50_000) % 10)
    data = make_data("random", split, split)
    model, optimizer = normkit.apply("batch", build_model("resnet20", input_shape=(3, 32, 32), classes=10), lr=0.01)
    network = LossOf(model, classification_loss)
    samples = TensorSamples(data, split, Augmentation(flip=True, crop=4))
    stream = batches(samples, batch_size=batch_size, budget=10**9, seed=0)
    batch = next(stream)

    def pipeline() -> None:
        for _ in range(steps):
            next(stream)

    def training() -> None:
        for _ in range(steps):
            training_step(network, optimizer, batch, Training())

    seconds = interleaved({"pipeline": pipeline, "training": training}, rounds)
    share = ratio(seconds["pipeline"], seconds["training"])
    return {
        "batch_size": batch_size,
        "pipeline_ms": 1e3 * sorted(seconds["pipeline"])[rounds // 2] / steps,
        "step_ms": 1e3 * sorted(seconds["training"])[rounds // 2] / steps,
        "share": share,
    }


def main() -> None:
    """Measure batch sizes 128, 8 and 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds only; the result is not written")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 2 if arguments.quick else 9
    # small batches are prepared 64 examples at a time: whole blocks are measured
    rows = [measure(size, steps, rounds) for size, steps in ((128, 1), (8, 8), (1, 64))]
    for row in rows:
        share = row["share"]
        print(
            f"batch {row['batch_size']:>3}: pipeline {row['pipeline_ms']:.2f} ms, step {row['step_ms']:.1f} ms, "
            f"share {share['median']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
        )
    if not arguments.quick:
        save("data_pipeline", f"python benchmarks/data_pipeline.py --threads {arguments.threads}", rows)


if __name__ == "__main__":
    main()
