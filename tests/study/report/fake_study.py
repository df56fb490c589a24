"""Studies with invented results, to look at reports without training anything."""

import math
import random

from normkit.study.records import Cost, CurvePoint, StudyRecord, TrialKey, TrialResult

METHODS = ("batch", "group", "layer", "batch-renorm", "none")
SIZES = (64, 8, 1)
_LEVEL = {  # accuracy at batch size 64, 8, 1
    "batch": (0.962, 0.941, 0.118),
    "group": (0.958, 0.955, 0.932),
    "layer": (0.951, 0.949, 0.921),
    "batch-renorm": (0.960, 0.944, 0.31),
    "none": (0.887, 0.903, 0.894),
}
RECIPES = {
    "batch": {"summary": "Batch normalization as the model has it", "paper": "Ioffe, Szegedy 2015, arXiv 1502.03167"},
    "group": {"summary": "Group normalization", "paper": "Wu, He 2018, arXiv 1803.08494"},
    "layer": {"summary": "Layer normalization", "paper": "Ba, Kiros, Hinton 2016, arXiv 1607.06450"},
    "batch-renorm": {"summary": "Batch renormalization", "paper": "Ioffe 2017, arXiv 1702.03275"},
    "none": {"summary": "No normalization: layers removed, biases restored", "paper": ""},
}


def result(
    phase="final",
    method="batch",
    size=64,
    lr=0.1,
    seed=0,
    accuracy=0.9,
    state="finished",
    error=None,
    curve=(),
    gap=0.01,
):
    """One trial that ended with ``accuracy``."""
    done = state == "finished"
    return TrialResult(
        TrialKey(phase, method, size, lr, seed),
        state,
        error=error or (None if done else "loss became non-finite at example 512"),
        validation_score=accuracy if done else None,
        validation_loss=0.3 if done else None,
        test_score=accuracy if done and phase == "final" else None,
        test_loss=0.3 if done and phase == "final" else None,
        train_eval_gap=gap if done and phase == "final" else None,
        seconds=1.25,
        curve=curve,
    )


def record(trials, methods=METHODS, sizes=SIZES, seeds=3, planned=None, costs=(), recipes=None, **config):
    """A study around the given trials."""
    base = {
        "data": "digits",
        "data_summary": "digits: 1078 training, 269 validation and 450 test examples of 10 classes, 1x8x8 inputs",
        "model": "digits-cnn",
        "methods": list(methods),
        "batch_sizes": list(sizes),
        "seeds": seeds,
        "budget": 1500,
        "reference": "batch" if "batch" in methods else methods[0],
        "chance": 0.1,
        "chance_loss": math.log(10),
        "alternative": "two-sided",
    }
    return StudyRecord(
        {**base, **config},
        {"python": "3.11.2", "torch": "2.13.0", "device": "cpu", "processor": "x86_64, 2 cores"},
        "normkit compare --methods batch,group --out 'runs/my study'",
        tuple(trials),
        tuple(costs),
        len(trials) if planned is None else planned,
        RECIPES if recipes is None else recipes,
    )


def curve(random_state, end, budget=1500, diverged=False):
    points, start = [], math.log(10) + random_state.gauss(0.1, 0.05)
    for k in range(1, 16):
        loss = end + (start - end) * math.exp(-k / 4) + abs(random_state.gauss(0, 0.04))
        points.append(CurvePoint(budget * k // 15, loss * (1 + k if diverged else 1)))
        if diverged and k == 5:
            break
    return tuple(points)


def realistic(methods=METHODS, sizes=SIZES, seeds=3, **config):
    """A whole study such as the default command would make."""
    source = random.Random(7)
    trials, costs = [], []
    for method in methods:
        for size in sizes:
            level = _LEVEL.get(method, (0.95, 0.94, 0.9))[SIZES.index(size)]
            centre = 0.1 if size > 8 else 0.02
            for factor in (0.1, 0.3, 1.0, 3.0):
                lr, seed = float(f"{centre * factor:.3g}"), 1000
                bad = factor > 1.0 and method in {"none", "batch-renorm"}
                accuracy = max(0.08, level - 0.12 * abs(math.log10(factor)) ** 2 + source.gauss(0, 0.01))
                state = "diverged" if bad else "finished"
                trials.append(result("search", method, size, lr, seed, accuracy, state))
            for seed in range(seeds):
                accuracy = round(360 * (level + source.gauss(0, 0.006))) / 360
                bad = method == "batch-renorm" and size == 1 and seed == 1
                line = curve(source, 2.3 * (1 - level) + 0.05, diverged=bad)
                state = "diverged" if bad else "finished"
                gap = 0.002 if method in {"group", "layer", "none"} else 0.6 / size
                trials.append(result("final", method, size, centre, seed, accuracy, state, curve=line, gap=gap))
            ratio = {"batch": 1.0, "group": 1.08, "layer": 1.11, "batch-renorm": 1.62, "none": 0.83}.get(method, 1.2)
            memory = 1_234_567 * size // 64
            costs.append(
                Cost(method, size, 0.0021 * ratio, ratio, ratio * 0.97, ratio * 1.04, int(memory * ratio), ratio)
            )
    return record(trials, methods, sizes, seeds, costs=costs, **config)
