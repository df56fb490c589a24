"""What a study's trial costs over a hand-written training loop: python benchmarks/trial_overhead.py [--quick].

Both train a network on the same number of batches, interleaved. The loop below is what a person would
write, schedule included, on inputs normalised beforehand; the trial adds normalisation, the curve and what is needed to go on
after a kill. Evaluation is left out of both. Measured is processor time, so that other processes count as little as they can.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import normkit
from common import interleaved, ratio, save
from normkit.study.classification import load_classification
from normkit.study.config import StudyConfig
from normkit.study.records import CurvePoint, TrialKey
from normkit.study.train.loop import LOSS_POINTS, Loop
from normkit.study.train.schedules import lr_factor
from normkit.study.train.trial import build_trial

REPEATS = 4  # pairs of runs, each 23 paired times


def measure(
    model: str, method: str, batch_size: int, chunk: int, repeats: int, *, general: bool = False
) -> dict[str, object]:
    """Paired times of trials' loops and of bare ones, in turns ``chunk`` steps each: from point to point of the curve.

    ``general``: of a task of one's own, whose samples a ``DataLoader`` collates one by one in the bare loop.
    """
    rounds = LOSS_POINTS - 1
    steps = LOSS_POINTS * chunk
    config = StudyConfig(model=model, methods=(method,), batch_sizes=(batch_size,), budget=steps * batch_size)
    key = TrialKey("search", method, batch_size, 0.01, 0)
    task = load_classification(config)
    data = task.data
    inputs, labels = data.normalise(data.train.inputs), data.train.labels
    samples = TensorDataset(inputs, labels)
    if general:
        task = normkit.Task(
            "digits",
            task.model,
            train=samples,
            validation=samples,
            test=samples,
            loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
            score=lambda network, batches: 0.0,
        )

    def trial() -> Iterator[CurvePoint]:
        loop = Loop(config, key, task, *build_trial(config, key, task))
        loop._validate = lambda _: None  # type: ignore[method-assign]
        return loop.points()

    def bare() -> Iterator[None]:
        network, optimizer = build_trial(config, key, task)
        schedule = LambdaLR(optimizer, lambda step: lr_factor("cosine", step, steps, 0.05))
        order = torch.cat([torch.randperm(len(labels)) for _ in range(-(-config.budget // len(labels)))])[
            : config.budget
        ]
        if general:
            batches = iter(DataLoader(samples, batch_size, sampler=order.tolist()))
        else:
            batches = ((inputs[indices], labels[indices]) for indices in order.split(batch_size))
        network.train()
        for step, (some, classes) in enumerate(batches, start=1):
            optimizer.zero_grad()
            loss = cross_entropy(network(some), classes)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % chunk == 0:
                yield

    seconds: dict[str, list[float]] = {"trial": [], "bare": []}
    for _ in range(repeats):
        tasks = {"trial": partial(next, trial()), "bare": partial(next, bare())}
        for name, times in interleaved(tasks, rounds, clock=time.process_time).items():
            seconds[name] += times
    return {
        "model": model,
        "method": method,
        "batch_size": batch_size,
        "general": general,
        "bare_step_ms": 1e3 * median(seconds["bare"]) / chunk,
        "overhead": ratio(seconds["trial"], seconds["bare"]),
    }


def main() -> None:
    """Measure the small networks and ResNet-20."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short; the result is not written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    share = 8 if arguments.quick else 1
    cases = (
        *(("digits-cnn", "batch", 64, 32), ("digits-cnn", "batch", 8, 80), ("digits-cnn", "batch", 1, 240)),
        *(("cnn5", "none", 1, 240), ("resnet20", "batch", 64, 8), ("resnet20", "batch", 1, 40)),
    )
    repeats = 1 if arguments.quick else REPEATS
    rows = [measure(model, method, size, chunk // share, repeats) for model, method, size, chunk in cases]
    rows += [
        measure("digits-cnn", "batch", size, chunk // share, repeats, general=True)
        for size, chunk in ((64, 32), (1, 240))
    ]
    for row in rows:
        found, own = row["overhead"], ", own task" if row["general"] else ""
        print(
            f"{row['model']:>10}, {row['method']:>5}, batch size {row['batch_size']:>2}{own}: bare step "
            f"{row['bare_step_ms']:.2f} ms, trial / bare {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        )
    if not arguments.quick:
        save("trial_overhead", "python benchmarks/trial_overhead.py", rows)


if __name__ == "__main__":
    main()
