"""Started by torchrun: trains every recipe on two ranks and writes what came out, and whether the ranks still agree."""

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import normkit
from normkit.study.config import StudyConfig
from normkit.study.load import load
from normkit.study.records import TrialKey
from normkit.study.task import Task
from normkit.study.train import loop as loop_module
from normkit.study.train.loop import Loop, evaluate
from normkit.study.train.trial import build_trial, run_trial

METHODS = [m for m in normkit.recipes() if m != "zero-gamma"]  # which needs residual branches
CONFIG = StudyConfig(model="digits-cnn", methods=("batch",), batch_sizes=(12,), budget=48, micro_batch=4, lr=0.02)
WHOLE = dataclasses.replace(CONFIG, batch_sizes=(13,), micro_batch=0)  # ranks' shares differ: 7 and 6, at last 5 and 4


def key(config: StudyConfig, method: str) -> TrialKey:
    """The run that is trained on one process and on two ranks."""
    return TrialKey("final", method, config.batch_sizes[0], 0.02, 0)


def spread(model: torch.nn.Module) -> float:
    """Largest difference between the ranks' parameters."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    other = flat.clone()
    dist.broadcast(other, src=0)
    return float((flat - other).abs().max())


def trained(config: StudyConfig, method: str, task: Task) -> dict[str, Any]:
    """Training losses of a run on both ranks, accuracy and loss on the test split, and how far the ranks are apart."""
    model, optimizer = build_trial(config, key(config, method), task)
    losses = [point.train_loss for point in Loop(config, key(config, method), task, model, optimizer).points()]
    return {"losses": losses, "test": evaluate(model, task, "test", config), "spread": spread(model)}


class Killed(BaseException):
    """Stands for a kill."""


def interrupted(folder: Path, task: Task) -> float:
    """Difference in validation loss of a run with dropout-like noise that is killed and goes on, to one that is not."""
    config = dataclasses.replace(CONFIG, budget=144, best_weights=True)
    loop_module.CHECKPOINT_SECONDS = 0.0
    whole = run_trial(config, key(config, "noisy-batch"), task)
    points = iter(range(100))

    def kill(_: object) -> bool:
        if next(points) == 6:
            raise Killed
        return False

    try:
        run_trial(config, key(config, "noisy-batch"), task, folder=folder, on_point=kill)
    except Killed:
        assert list(folder.glob("*.ckpt"))
    torch.manual_seed(123)
    again = run_trial(config, key(config, "noisy-batch"), task, folder=folder)
    return abs(again.validation_loss - whole.validation_loss)


def best_steps(task: Task) -> list[int | None]:
    """Where each rank found the best weights, when every rank sees another accuracy: rank 0's falls, rank 1's rises."""
    config = dataclasses.replace(CONFIG, best_weights=True)
    count, slope = iter(range(1, 100)), 1 if dist.get_rank() else -1
    real, loop_module.evaluate = loop_module.evaluate, lambda *_: (0.5 + 0.01 * slope * next(count), 1.0)
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, run_trial(config, key(config, "batch"), task).best_step)
    loop_module.evaluate = real
    return steps


def main() -> None:
    """Rank 1 writes, so that agreement is judged where it can fail."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    task = load(CONFIG)
    outcome: dict[str, Any] = {
        name: {method: trained(config, method, task) for method in METHODS}
        for name, config in (("micro", CONFIG), ("whole", WHOLE))
    }
    outcome["interrupted"] = interrupted(Path(sys.argv[1]), task)
    outcome["best_steps"] = best_steps(task)
    if dist.get_rank() == 1:
        (Path(sys.argv[1]) / "outcome.json").write_text(json.dumps(outcome))
    gc.collect()  # models in reference cycles hold the group beyond its end
    dist.barrier()  # gloo may still serve the other rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
