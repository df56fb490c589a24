"""The task of a study: data, model, loss and score. Nothing below knows of classes, accuracy or cross-entropy.

Classification is one maker of it, regression another; ``normkit.integrations`` makes tasks of what people already have.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, Subset

from normkit.study.data.batches import batches, evaluation_batches
from normkit.study.data.dataset import TensorSamples, held_out
from normkit.study.data.samples import MicroBatch
from normkit.study.data.sampling import generator
from normkit.study.errors import StudyError
from normkit.study.records import Metric

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Score = Callable[[nn.Module, Iterable[Batch]], float]
Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True)
class Task:
    """The subject of a study: ``model`` is trained on ``train`` with ``loss``, and methods are compared by ``score``.

    Attributes:
        name: Its name in the report.
        model: Builds a fresh model; its weights come from the seeded generators of torch, NumPy and Python.
        train: Map-style dataset of any samples.
        test: Likewise; only final runs are tested on it.
        loss: ``loss(model, batch)``, the mean over the samples of the batch, a scalar with a gradient.
        score: ``score(model, batches)``, one number for a whole split; the model is in eval mode, gradients are off.
        validation: Chooses learning rates; None to hold out a part of ``train``.
        metric: Name of the score.
        unit: Its unit; with ``%`` the score is a fraction that is shown in percent.
        higher_is_better: Whether a higher score is a better one.
        collate: Makes a batch from a list of samples; None for torch's ``default_collate``.
        inputs: ``inputs(batch)``, the model's input, for methods that start from data: a tensor, or a mapping of keyword
            arguments. None for the batch itself, its first element, or its only value that is a tensor.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(20, 3)
        >>> data = TensorDataset(x, x.sum(1, keepdim=True))
        >>> def error(model, batches):
        ...     return max(float((model(x) - y).abs().max()) for x, y in batches)
        >>> task = Task(
        ...     "sums",
        ...     model=lambda: nn.Linear(3, 1),
        ...     train=data,
        ...     test=data,
        ...     loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        ...     score=error,
        ...     metric="largest error",
        ...     higher_is_better=False,
        ... )
        >>> task.metric
        'largest error'
    """

    name: str
    model: Callable[[], nn.Module]
    train: Dataset[Any]
    test: Dataset[Any]
    loss: Loss
    score: Score
    _: KW_ONLY
    validation: Dataset[Any] | None = None
    metric: str = "score"
    unit: str = ""
    higher_is_better: bool = True
    collate: Collate | None = None
    inputs: Callable[[Batch], Any] | None = None

    # -- makers -------------------------------------------------------------------------------------------------------

    @staticmethod
    def classification(
        name: str,
        model: Callable[[], nn.Module],
        train: Dataset[Any],
        test: Dataset[Any],
        *,
        validation: Dataset[Any] | None = None,
        classes: int | None = None,
        label_smoothing: float = 0.0,
        collate: Collate | None = None,
    ) -> "Task":
        """Make a classification task: cross-entropy, and accuracy in percent.

        Args:
            name: Its name in the report.
            model: Builds a fresh model from inputs to logits ``(N, classes)``.
            train: Dataset of (input, class number).
            test: Likewise.
            validation: Likewise, or None.
            classes: Number of classes, for the chance level in figures; None to leave it out.
            label_smoothing: Fraction of the label spread over all classes in training, in [0, 1).
            collate: As in ``Task``.
        """
        return Classification(
            name,
            model,
            train,
            test,
            classification_loss,
            accuracy,
            validation=validation,
            metric="accuracy",
            unit="%",
            collate=collate,
            classes=classes,
            label_smoothing=label_smoothing,
        )

    @staticmethod
    def regression(
        name: str,
        model: Callable[[], nn.Module],
        train: Dataset[Any],
        test: Dataset[Any],
        *,
        validation: Dataset[Any] | None = None,
        unit: str = "",
        collate: Collate | None = None,
    ) -> "Task":
        """Make a regression task: mean squared error, and its root over a split (RMSE, lower is better).

        Args:
            name: Its name in the report.
            model: Builds a fresh model from inputs to outputs of the shape of the targets.
            train: Dataset of (input, target).
            test: Likewise.
            validation: Likewise, or None.
            unit: Unit of the targets.
            collate: As in ``Task``.
        """
        return Task(
            name,
            model,
            train,
            test,
            _squared_error,
            _root_mean_square,
            validation=validation,
            metric="RMSE",
            unit=unit,
            higher_is_better=False,
            collate=collate,
        )

    # -- what a study asks of it --------------------------------------------------------------------------------------

    @property
    def measure(self) -> Metric:
        """What methods are compared by."""
        return Metric(self.metric, self.unit, self.higher_is_better)

    @property
    def chance(self) -> float | None:
        """Score of guessing, where it is known."""
        return None

    @property
    def chance_loss(self) -> float | None:
        """Loss of guessing, where it is known."""
        return None

    @property
    def note(self) -> str:
        """What a reader of a figure must know about the data."""
        return ""

    @property
    def data_label(self) -> str:
        """What a message calls the data."""
        return f"task {self.name!r}"

    @property
    def model_label(self) -> str:
        """What a message calls the model."""
        return f"the model of task {self.name!r}"

    @property
    def model_summary(self) -> str:
        """The model in a word, for the report."""
        return type(self.model()).__name__

    @property
    def sizes(self) -> str:
        """Name and sizes of the splits."""
        held = f", {length(self.validation)} validation" if self.validation is not None else ""
        return f"{self.name}: {length(self.train)} training{held} and {length(self.test)} test"

    @property
    def summary(self) -> str:
        """The data in one line, for the report."""
        return f"{self.sizes} samples"

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss that is minimised; ``loss`` without what is added in training only."""
        return self.loss(model, batch)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float | None]:
        """Score a split, and its mean loss where it comes with the score."""
        return as_number(self.score(model, batches)), None

    def first_of(self, batch: Batch) -> Any:
        """What the model is called with, in a form that ``normkit.apply(batches=...)`` understands.

        Raises:
            StudyError: It cannot be told from the batch.
        """
        if self.inputs is not None:
            return self.inputs(batch)
        if isinstance(batch, Mapping):
            found = [value for value in batch.values() if isinstance(value, Tensor)]
            if len(found) != 1:
                raise StudyError(
                    f"task {self.name!r}: a batch has {len(found)} tensors ({', '.join(map(str, batch))}), and the model's "
                    "input is not known; give Task(inputs=...)"
                )
            return found[0]
        return batch[0] if isinstance(batch, tuple | list) else batch

    def training_batches(self, **how: Any) -> Iterator[list[MicroBatch]]:
        """Micro-batches of every training batch; options as of ``normkit.study.data.batches.batches``."""
        return batches(self.train, collate=self.collate, **how)

    def first_batch(self, samples: int, device: str) -> Batch:
        """The first training samples, in their order and not augmented, as a batch."""
        how = {"batch_size": samples, "device": device, "collate": self.collate, "name": "train"}
        return next(evaluation_batches(self.train, **how))

    def evaluation_batches(
        self, split: str, *, device: torch.device | str, most: int, workers: int = 0
    ) -> Iterator[Batch]:
        """All samples of a split once, in their order.

        Args:
            split: ``validation`` or ``test``.
            device: Where the batches go.
            most: Samples that training has in one forward pass.
            workers: Processes that fetch samples ahead.
        """
        how = {"batch_size": self._forward_size(256, most), "device": device, "collate": self.collate}
        return evaluation_batches(getattr(self, split), name=split, workers=workers, **how)

    def initial_inputs(self, *, seed: int, device: str, most: int, samples: int) -> Iterator[Any]:
        """Inputs of the first training samples, in batches, for methods that start from data.

        Args:
            seed: Seed of their order.
            device: Where they go.
            most: Samples that training has in one forward pass.
            samples: How many.

        Yields:
            What the model is called with.
        """
        size = self._forward_size(64, most)
        how = {"batch_size": size, "budget": samples, "seed": seed, "device": device, "augmented": False}
        for (micro,) in self.training_batches(**how):
            yield self.first_of(micro.batch)

    def _forward_size(self, wanted: int, most: int) -> int:
        """Samples in one forward pass outside of training; those of a general task may be large."""
        return wanted if isinstance(self.train, TensorSamples) else min(wanted, most)

    def with_validation(self, amount: float | int) -> "Task":
        """The same task with a validation split; if it has none, ``amount`` of the training samples are held out.

        Args:
            amount: A fraction in (0, 1), or a number of samples.

        Raises:
            StudyError: One of the two splits would be empty.
        """
        if self.validation is not None:
            return self
        total = length(self.train)
        count = held_out(amount, total)
        order = torch.randperm(total, generator=generator(0, "validation")).tolist()
        chosen, kept = sorted(order[:count]), sorted(order[count:])
        return replace(self, train=Subset(self.train, kept), validation=Subset(self.train, chosen))


@dataclass(frozen=True)
class Classification(Task):
    """A classification task; see ``Task.classification``."""

    classes: int | None = None
    label_smoothing: float = 0.0

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing."""
        return 1 / self.classes if self.classes else None

    @property
    def chance_loss(self) -> float | None:
        """Cross-entropy of guessing, in nats."""
        return math.log(self.classes) if self.classes else None

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with smoothed labels."""
        inputs, labels = batch
        return cross_entropy(model(inputs), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float | None]:
        """Accuracy, a fraction, and mean cross-entropy in nats, from one pass."""
        correct, loss, samples = 0, 0.0, 0
        for inputs, labels in batches:
            logits = model(inputs).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            samples += len(labels)
        return correct / samples, loss / samples


def as_number(value: Any) -> float:
    """Return a score as a number.

    Raises:
        StudyError: It is none, or several.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise StudyError(f"the score is a tensor of shape {tuple(value.shape)}; return one number for the whole split")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise StudyError(f"the score is a {type(value).__name__}; return one number for the whole split") from error


def length(dataset: Any) -> int:
    """Return the number of samples of a map-style dataset; torch's ``Dataset`` does not declare it.

    Raises:
        StudyError: It has no length.
    """
    try:
        return len(dataset)
    except TypeError as error:
        raise StudyError(f"{type(dataset).__name__} has no length; give a map-style dataset") from error


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats."""
    inputs, labels = batch
    return cross_entropy(model(inputs).float(), labels)


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Fraction of samples whose class has the largest logit."""
    found = [(model(inputs).argmax(1) == labels) for inputs, labels in batches]
    return float(torch.cat(found).double().mean())


def _errors(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    if outputs.shape != targets.shape:
        if outputs.numel() != targets.numel():
            raise ValueError(
                f"the model's output {tuple(outputs.shape)} does not fit the targets {tuple(targets.shape)}; make them alike"
            )
        targets = targets.reshape(outputs.shape)  # (N,) and (N, 1) would broadcast to (N, N)
    return outputs, targets.to(outputs.dtype)


def _squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return mse_loss(*_errors(model, batch))


def _root_mean_square(model: nn.Module, batches: Iterable[Batch]) -> float:
    squares, values = 0.0, 0
    for batch in batches:
        outputs, targets = _errors(model, batch)
        squares += float((outputs - targets).double().square().sum())
        values += targets.numel()
    return math.sqrt(squares / values)
