"""One training run: deterministic, and without a method's name anywhere in the loop.

The same key gives the same result bit for bit on a CPU, however many trials run beside it: one torch thread, weights and
data order from the seed alone.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import evenkeel
from evenkeel.study.batches import batches, evaluation_batches
from evenkeel.study.data import Data, Split, load_data
from evenkeel.study.models import build_model
from evenkeel.study.plan import StudyConfig
from evenkeel.study.records import CurvePoint, TrialKey, TrialResult

VALIDATION_SHARE = 0.2  # of the training split, unless the data brings its own
LOSS_POINTS = 24  # points of the training curve
ACCURACY_POINTS = 8  # of them with validation accuracy
INITIAL_EXAMPLES = 256  # for methods that start from data
GAP_EXAMPLES = 1024  # for the train/eval gap


class Diverged(ArithmeticError):
    """The training loss became non-finite."""


def load(config: StudyConfig) -> Data:
    """The data of a study on its device, with a validation split."""
    data = load_data(config.data)
    train, validation = data.split_validation(VALIDATION_SHARE)
    return replace(data, train=train, validation=validation).to(config.device)


def make(config: StudyConfig, key: TrialKey, data: Data) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer of a trial; the weights depend on the seed alone, so methods share them where shapes agree."""
    torch.manual_seed(key.seed)
    model = build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device)
    first = batches(data, data.train, batch_size=64, budget=INITIAL_EXAMPLES, seed=key.seed, device=config.device)
    return evenkeel.apply(
        key.method,
        model,
        lr=key.lr,
        batches=[inputs for inputs, _ in first],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def warm_up_and_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: linear up over the first 5 % of the steps, then half a cosine down to zero."""
    warm = max(1, math.ceil(steps / 20))
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def training_step(model: nn.Module, optimizer: Optimizer, inputs: Tensor, labels: Tensor, micro_batch: int) -> Tensor:
    """One optimizer step on one batch, in micro-batches whose gradients accumulate; returns the mean loss."""
    optimizer.zero_grad()
    total = torch.zeros((), device=inputs.device)
    for x, y in zip(inputs.split(micro_batch), labels.split(micro_batch), strict=True):
        loss = cross_entropy(model(x), y) * (len(y) / len(labels))
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: Split) -> tuple[float, float]:
    """Accuracy (fraction) and mean cross-entropy (nats) on a split, in eval mode; the mode is restored."""
    training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in evaluation_batches(data, split, device=split.labels.device):
        logits = model(inputs).float()
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
    model.train(training)
    return correct / len(split), loss / len(split)


@torch.no_grad()
def train_eval_gap(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss in eval mode minus in train mode on the same batches, in nats; the model is left as it was."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    losses: dict[bool, float] = {}
    for mode in (True, False):
        model.train(mode)
        losses[mode] = sum(float(cross_entropy(model(x).float(), y)) for x, y in batches) / len(batches)
        for buffer, before in buffers:
            buffer.copy_(before)
    model.train(training)
    return losses[False] - losses[True]


def run_trial(config: StudyConfig, key: TrialKey, data: Data) -> TrialResult:
    """Train and judge once; what goes wrong is in the result, never raised."""
    start = time.perf_counter()
    curve: list[CurvePoint] = []

    def ended(state: str, **values: float | str | None) -> TrialResult:
        return TrialResult(key, state, seconds=time.perf_counter() - start, curve=tuple(curve), **values)  # type: ignore[arg-type]

    try:
        model, optimizer = make(config, key, data)
        for point in train(config, key, data, model, optimizer):
            curve.append(point)
        assert data.validation is not None
        accuracy, loss = evaluate(model, data, data.validation)
        if not math.isfinite(loss):
            raise Diverged("the validation loss is not finite")
        test_accuracy, test_loss = evaluate(model, data, data.test) if key.phase == "final" else (None, None)
        budget = min(GAP_EXAMPLES, 64 * key.batch_size) // key.batch_size * key.batch_size
        sample = batches(
            data, data.train, batch_size=key.batch_size, budget=budget, seed=key.seed, device=config.device
        )
        gap = train_eval_gap(model, list(sample))
        return ended(
            "finished",
            validation_accuracy=accuracy,
            validation_loss=loss,
            test_accuracy=test_accuracy,
            test_loss=test_loss,
            train_eval_gap=gap,
        )
    except Diverged as error:
        return ended("diverged", error=str(error))
    except (Exception, MemoryError) as error:  # the study goes on; the report shows the line
        return ended("failed", error=f"{type(error).__name__}: {error}".splitlines()[0])


def train(
    config: StudyConfig, key: TrialKey, data: Data, model: nn.Module, optimizer: Optimizer
) -> Iterator[CurvePoint]:
    """The training loop; yields the points of the training curve.

    Raises:
        Diverged: The loss became non-finite.
    """
    assert data.validation is not None
    steps = math.ceil(config.budget / key.batch_size)
    schedule = LambdaLR(optimizer, lambda step: warm_up_and_cosine(step, steps))
    loss_every = max(1, steps // LOSS_POINTS)
    accuracy_every = loss_every * max(1, LOSS_POINTS // ACCURACY_POINTS)
    stream = batches(
        data, data.train, batch_size=key.batch_size, budget=config.budget, seed=key.seed, device=config.device
    )
    model.train()
    total, count, seen = torch.zeros((), device=config.device), 0, 0
    for step, (inputs, labels) in enumerate(stream, start=1):
        total += training_step(model, optimizer, inputs, labels, config.micro_batch or len(labels))
        schedule.step()
        count, seen = count + 1, seen + len(labels)
        if step % loss_every == 0 or step == steps:
            mean = float(total) / count
            if not math.isfinite(mean):
                raise Diverged(f"the training loss was not finite after {seen} examples")
            accuracy = None
            if step % accuracy_every == 0 or step == steps:
                accuracy, _ = evaluate(model, data, data.validation)
            yield CurvePoint(seen, mean, accuracy)
            total, count = torch.zeros((), device=config.device), 0
