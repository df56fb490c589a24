"""The training loop: one for all methods, interruptible anywhere, the same on one process and on several ranks."""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normkit.inspection.compiling import guard_hooks
from normkit.study.config import StudyConfig, Training
from normkit.study.data.samples import MicroBatch
from normkit.study.data.structure import map_tensors
from normkit.study.records import CurvePoint, TrialKey
from normkit.study.task import Batch, Loss, Task, length
from normkit.study.train.checkpoint import CheckpointFile
from normkit.study.train.gather_batch import WholeBatch
from normkit.study.train.schedules import lr_factor
from normkit.study.train.weights import BestWeights, WeightAverage

LOSS_POINTS = 24  # points of the training curve
SCORE_POINTS = 8  # of them with a validation score
CHECKPOINT_SECONDS = 60.0
ADDED_TOGETHER = 64  # losses of steps: in a row an addition takes a fraction of its time between two steps


class Diverged(ArithmeticError):
    """The training loss became non-finite."""


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks of a data-parallel trial; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank; without ranks the value itself."""
    if ranks()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def precision(training: Training, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where the study asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if training.amp else nullcontext()


class LossOf(nn.Module):
    """The loss of a model on a batch as a module's forward, which is what data parallelism synchronises.

    Args:
        model: The model, compiled or not.
        loss: ``loss(model, batch)``, whatever it does with the model.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch, samples: int) -> Tensor:
        """The mean loss of ``samples`` samples."""
        return self.loss(self.model, batch)


def prepare(training: Training, model: nn.Module, loss: Loss) -> nn.Module:
    """The module whose forward is the loss of ``model``.

    The model's memory layout is changed in place; the model is compiled, and its loss data-parallel under ranks.
    """
    if training.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if training.compile:
        guard_hooks()
    network: nn.Module = LossOf(torch.compile(model) if training.compile else model, loss)  # pyright: ignore[reportArgumentType]
    if ranks()[1] > 1:
        network = DistributedDataParallel(network)
        if not training.micro_batch:  # of which each has statistics of its own, on one process too
            WholeBatch(network, model)
    return network


def training_step(
    network: nn.Module,
    optimizer: Optimizer,
    batch: Sequence[MicroBatch],
    training: Training,
    weight: float = 1.0,
) -> Tensor:
    """One optimizer step on one batch, in micro-batches whose gradients accumulate.

    Args:
        network: What ``prepare`` returned.
        optimizer: The optimizer.
        batch: The micro-batches of this rank's share of the batch.
        training: How to train.
        weight: Of this rank's share in the mean over ranks, which data parallelism takes of gradients: its samples times ranks
            over those of the whole batch. Shares may be of different sizes.

    Returns:
        The mean loss over this rank's share. Of a batch in one piece it still holds its graph, without what backward needed:
        while a caller keeps it, the next step finds the parameters' gradient accumulators and makes none.
    """
    optimizer.zero_grad()
    if len(batch) == 1:
        total = _backward(network, batch[0], training, weight)
    else:
        losses, count = [], samples_of(batch)
        for number, micro in enumerate(batch, start=1):
            with nullcontext() if number == len(batch) else _unsynchronised(network):
                loss = _backward(network, micro, training, micro.samples * weight / count)
            losses.append(loss.detach() * (micro.samples / count))
        total = sum(losses[1:], start=losses[0])
    optimizer.step()
    return total


def samples_of(batch: Sequence[MicroBatch]) -> int:
    """Number of samples of a batch in micro-batches."""
    return batch[0].samples if len(batch) == 1 else sum(micro.samples for micro in batch)


def _backward(network: nn.Module, micro: MicroBatch, training: Training, share: float) -> Tensor:
    """Add ``share`` times the gradient of the mean loss; returns that loss."""
    batch = map_tensors(_channels_last, micro.batch) if training.channels_last else micro.batch
    with precision(training, next(network.parameters()).device) if training.amp else nullcontext():
        call = network.forward if type(network) is LossOf else network  # which has no hooks
        loss = call(batch, micro.samples)
    (loss if share == 1 else loss * share).backward()
    return loss


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _unsynchronised(network: nn.Module) -> AbstractContextManager[Any]:
    """Ranks exchange gradients once per step, with the last micro-batch: not within this block."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: str, config: StudyConfig) -> tuple[float, float | None]:
    """Return the score, and the mean loss where the task has one, on a split in eval mode; then restore the mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with precision(config, device):
            how = {"device": device, "most": config.most_at_once, "workers": config.data_workers}
            return task.evaluate(model, task.evaluation_batches(split, **how))
    finally:
        model.train(was_training)


def evaluate_once(model: nn.Module, task: Task, split: str, config: StudyConfig) -> tuple[float, float | None]:
    """Evaluate on rank 0 alone, and share the figures with all ranks.

    Raises:
        Diverged: The score is not finite.
    """
    score, loss = from_first(evaluate(model, task, split, config) if ranks()[0] == 0 else None)
    if not math.isfinite(score):
        raise Diverged(f"the {split} {task.metric} is not finite")
    return score, loss


class Loop:
    """One training run. ``points()`` trains; between any two steps ``state_dict()`` is all that is needed to resume exactly.

    Args:
        config: The study.
        key: Which run.
        task: Its task, with a validation split.
        model: The model, as the method left it.
        optimizer: The method's optimizer.

    Attributes:
        curve: Points of the training curve so far.
        seen: Examples seen so far.
        seconds: Wall time spent so far, earlier sessions of an interrupted run included.
        validation_seconds: Of them, spent on validating.
        best: The weights with the best validation score so far, where the study judges them.
    """

    def __init__(self, config: StudyConfig, key: TrialKey, task: Task, model: nn.Module, optimizer: Optimizer) -> None:
        self.config, self.key, self.task, self.model, self.optimizer = config, key, task, model, optimizer
        self.network = prepare(config, model, task.training_loss)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.best = BestWeights(model, config.higher_is_better) if config.best_weights else None
        self.budget = config.budget_of(key.phase)
        self.steps = math.ceil(self.budget / key.batch_size)
        self.schedule = LambdaLR(optimizer, lambda step: lr_factor(config.schedule, step, self.steps, config.warm_up))
        self.curve: list[CurvePoint] = []
        self.seen, self.seconds, self.validation_seconds = 0, 0.0, 0.0
        self._total, self._count = torch.zeros((), device=config.device), 0
        self._losses: list[tuple[Tensor, float]] = []  # of the last steps, with weights, not in the total yet
        rank, _ = ranks()  # dropout and noise: alike for every method, however its model was built, other on every rank
        torch.manual_seed(key.seed + (rank << 32))

    def points(self, checkpoint: CheckpointFile | None = None) -> Iterator[CurvePoint]:
        """Train to the end of the budget.

        Args:
            checkpoint: Where to keep the state, about once a minute, or None.

        Yields:
            The points of the training curve.

        Raises:
            Diverged: The loss became non-finite.
        """
        config, size = self.config, self.key.batch_size
        rank, world = ranks()
        stream = self.task.training_batches(
            batch_size=size,
            budget=self.budget,
            seed=self.key.seed,
            device=config.device,
            start=self.seen,
            share=(rank, world),
            micro_batch=config.micro_batch,
            workers=config.data_workers,
        )
        loss_every = max(1, self.steps // LOSS_POINTS)
        score_every = loss_every * max(1, LOSS_POINTS // SCORE_POINTS)
        self.network.train()
        started = saved = time.perf_counter()
        earlier = self.seconds
        for step, batch in enumerate(stream, start=self.seen // size + 1):
            examples = min(size, self.budget - self.seen)
            weight = samples_of(batch) * world / examples
            loss = training_step(self.network, self.optimizer, batch, config, weight)
            self._losses.append((loss.detach(), weight))
            if len(self._losses) == ADDED_TOGETHER:
                self._add_losses()
            self.schedule.step()
            if self.average is not None:
                self.average.update()
            self._count, self.seen = self._count + 1, self.seen + examples
            at_point = step % loss_every == 0 or step == self.steps
            score = None
            if step % score_every == 0 or step == self.steps or self._ended_epoch(examples):
                score = self._validate(step)
            now = time.perf_counter()
            self.seconds = earlier + now - started
            if at_point:
                yield self._point(score)
            if checkpoint is not None and (world == 1 or at_point) and from_first(now - saved >= CHECKPOINT_SECONDS):
                checkpoint.save(self.state_dict())
                saved = time.perf_counter()

    def _ended_epoch(self, examples: int) -> bool:
        """Return whether the last ``examples`` ended an epoch, after which the weights are validated."""
        return self.best is not None and self.seen % length(self.task.train) < examples

    def _validate(self, step: int) -> float:
        started = time.perf_counter()
        with self.evaluated():
            score, _ = evaluate_once(self.model, self.task, "validation", self.config)
            if self.best is not None:
                self.best.offer(score, step)
        self.validation_seconds += time.perf_counter() - started
        return score

    def _add_losses(self) -> None:
        for loss, weight in self._losses:  # one after the other, as each step would
            self._total.add_(loss, alpha=weight)
        self._losses.clear()

    def _point(self, score: float | None) -> CurvePoint:
        self._add_losses()
        if ranks()[1] > 1:
            dist.all_reduce(self._total)
            self._total /= ranks()[1]
        mean = float(self._total) / self._count
        self._total, self._count = torch.zeros_like(self._total), 0
        if not math.isfinite(mean):
            raise Diverged(f"the training loss was not finite after {self.seen} examples")
        self.curve.append(CurvePoint(self.seen, mean, score))
        return self.curve[-1]

    @contextmanager
    def evaluated(self) -> Generator[None, None, None]:
        """Within the block the model has the weights that are evaluated: the average, where there is one."""
        with self.average.in_place() if self.average is not None else nullcontext():
            yield

    def final_weights(self) -> AbstractContextManager[None]:
        """After the run: within the block the model has its final weights: the best, the averaged or the last.

        The best weights stay in the model afterwards.
        """
        if self.best is None:
            return self.evaluated()
        self.best.restore()
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, random number generators included."""
        self._add_losses()
        cuda = torch.cuda.get_rng_state() if self.config.device.startswith("cuda") else None
        random: list[Any] = [(torch.get_rng_state(), cuda)]
        rank, world = ranks()
        if world > 1:
            random *= world
            dist.all_gather_object(random, random[rank])
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "best": self.best.state_dict() if self.best is not None else None,
            "random": random,
            "progress": (self.seen, self.seconds, self.validation_seconds, self._total, self._count),
            "curve": [asdict(point) for point in self.curve],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.best is not None:
            self.best.load_state_dict(state["best"])
        rank, world = ranks()
        if len(state["random"]) == world:  # on another number of ranks the run resumes with other random numbers
            self._set_random(*state["random"][rank])
        self.seen, self.seconds, self.validation_seconds, total, self._count = state["progress"]
        self._total = total.to(self.config.device)
        self._losses.clear()
        self.curve = [CurvePoint(**point) for point in state["curve"]]

    def _set_random(self, cpu: Tensor, cuda: Tensor | None) -> None:
        torch.set_rng_state(cpu.cpu())
        if cuda is not None:
            torch.cuda.set_rng_state(cuda.cpu())
