"""Cost of a method: time per step and memory relative to the reference, measured interleaved in one run.

Machines drift (clocks, other processes); a ratio of two measurements taken one right after the other does not.
"""

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer

from normkit.study.config import StudyConfig
from normkit.study.data.samples import MicroBatch
from normkit.study.data.structure import tensors
from normkit.study.plan import learning_rates
from normkit.study.records import Cost, TrialKey
from normkit.study.task import Task
from normkit.study.train.loop import precision, prepare, training_step
from normkit.study.train.trial import build_trial

ROUNDS = 9
ROUND_SECONDS = 0.04


def measure_costs(config: StudyConfig, task: Task) -> list[Cost]:
    """Cost of every method at every batch size; a method that cannot run has the reason in ``error``."""
    return [cost for size in sorted(config.batch_sizes, reverse=True) for cost in _costs(config, task, size)]


def _costs(config: StudyConfig, task: Task, size: int) -> list[Cost]:
    how = {"batch_size": size, "budget": size, "seed": 0, "device": config.device, "micro_batch": config.micro_batch}
    batch = next(task.training_batches(**how, augmented=False))
    methods = [config.reference, *(m for m in config.methods if m != config.reference)]
    timers: dict[str, Timer] = {}
    memory: dict[str, int] = {}
    failed: dict[str, str] = {}
    for method in methods:
        rate = min(learning_rates(config, method, size)) * 1e-3  # steps, without going anywhere
        try:
            model, optimizer = build_trial(config, TrialKey("search", method, size, rate, 0), task)
            network = prepare(config, model, task.training_loss).train()
            memory[method] = _memory(network, optimizer, batch, config)
            timer = Timer(
                "step(network, optimizer, batch, config)",
                globals={
                    "step": training_step,
                    "network": network,
                    "optimizer": optimizer,
                    "batch": batch,
                    "config": config,
                },
                num_threads=1,
            )
            timer.timeit(3)
            timers[method] = timer
        except Exception as error:  # a method that cannot run at this size is reported, not raised
            failed[method] = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds: dict[str, list[float]] = {method: [] for method in timers}
    if timers:
        number = max(1, int(ROUND_SECONDS / next(iter(timers.values())).timeit(1).mean))
        for _ in range(ROUNDS):
            for method, timer in timers.items():
                seconds[method].append(timer.timeit(number).mean)
    return [_cost(method, size, seconds, memory, config.reference, failed.get(method)) for method in config.methods]


def _cost(
    method: str, size: int, seconds: dict[str, list[float]], memory: dict[str, int], reference: str, error: str | None
) -> Cost:
    if error is not None:
        return Cost(method, size, error=error)
    cost = Cost(method, size, step_seconds=median(seconds[method]), memory_bytes=memory[method])
    if reference not in seconds:
        return cost
    ratios = sorted(own / other for own, other in zip(seconds[method], seconds[reference], strict=True))
    return Cost(
        method,
        size,
        step_seconds=cost.step_seconds,
        step_ratio=median(ratios),
        step_ratio_low=ratios[len(ratios) // 4],
        step_ratio_high=ratios[-1 - len(ratios) // 4],
        memory_bytes=cost.memory_bytes,
        memory_ratio=memory[method] / max(1, memory[reference]),
    )


def _memory(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[MicroBatch], config: StudyConfig
) -> int:
    """Peak bytes of a step on a GPU; on a CPU, bytes saved for backward (parameters and the batch not counted)."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        training_step(network, optimizer, batch, config)  # optimizer state is there from the first step on
        torch.cuda.reset_peak_memory_stats(device)
        training_step(network, optimizer, batch, config)
        return torch.cuda.max_memory_allocated(device)
    with precision(config, device):
        return saved_bytes(network, batch[0])


def saved_bytes(network: nn.Module, micro: MicroBatch) -> int:
    """Bytes of distinct storages that the loss saves for backward, parameters and the batch itself not counted.

    Args:
        network: What ``prepare`` returned.
        micro: What goes through it at once.
    """
    given = (*network.parameters(), *network.buffers(), *tensors(micro.batch))
    own = {t.untyped_storage().data_ptr() for t in given}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(*micro)
        size = sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in own)
        del loss
    return size
