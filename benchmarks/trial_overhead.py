"""What a study's trial costs over a hand-written training loop: python benchmarks/trial_overhead.py [--quick].

Both train the digits CNN with batch normalization on the same batches, interleaved. The loop below is what a person would
write, schedule included, on inputs normalised beforehand; the trial adds normalisation, the curve and what is needed to go on
after a kill. Evaluation is left out of both.
"""

import argparse

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from common import interleaved, ratio, save
from evenkeel.study.batches import stream
from evenkeel.study.loop import Loop
from evenkeel.study.plan import StudyConfig
from evenkeel.study.records import TrialKey
from evenkeel.study.schedules import lr_factor
from evenkeel.study.trial import load, make


def measure(model: str, batch_size: int, steps: int, rounds: int) -> dict[str, object]:
    """Paired times of a trial's loop and of a bare one."""
    config = StudyConfig(model=model, methods=("batch",), batch_sizes=(batch_size,), budget=steps * batch_size)
    key = TrialKey("search", "batch", batch_size, 0.01, 0)
    data = load(config)
    inputs, labels = data.normalise(data.train.inputs), data.train.labels

    def run_trial() -> None:
        network, optimizer = make(config, key, data)
        loop = Loop(config, key, data, network, optimizer)
        loop._point = lambda _: None  # type: ignore[method-assign, assignment, return-value]  # no evaluation
        for _ in loop.points():
            pass

    def run_bare() -> None:
        network, optimizer = make(config, key, data)
        network.train()
        schedule = LambdaLR(optimizer, lambda step: lr_factor("cosine", step, steps, 0.05))
        for indices in stream(len(labels), config.budget, batch_size, 0):
            optimizer.zero_grad()
            loss = cross_entropy(network(inputs[indices]), labels[indices])
            loss.backward()
            optimizer.step()
            schedule.step()

    seconds = interleaved({"trial": run_trial, "bare": run_bare}, rounds)
    return {
        "model": model,
        "batch_size": batch_size,
        "bare_step_ms": 1e3 * sorted(seconds["bare"])[rounds // 2] / steps,
        "overhead": ratio(seconds["trial"], seconds["bare"]),
    }


def main() -> None:
    """Measure the digits CNN and ResNet-20."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds only; the result is not written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if arguments.quick else 9
    cases = (("digits-cnn", 64, 40), ("digits-cnn", 1, 150), ("resnet20", 64, 6), ("resnet20", 1, 40))
    rows = [measure(*case, rounds) for case in cases]
    for row in rows:
        found = row["overhead"]
        print(
            f"{row['model']:>10}, batch {row['batch_size']:>2}: bare step {row['bare_step_ms']:.2f} ms, trial / bare "
            f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        )
    if not arguments.quick:
        save("trial_overhead", "python benchmarks/trial_overhead.py", rows)


if __name__ == "__main__":
    main()
