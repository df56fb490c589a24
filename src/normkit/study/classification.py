"""Classification by ``--data`` and ``--model``: one maker of tasks, and the checks that only it needs."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from normkit.study.config import StudyConfig
from normkit.study.data.augmentation import Augmentation
from normkit.study.data.dataset import Data, TensorSamples
from normkit.study.data.load import load_data
from normkit.study.data.sampling import seed_all
from normkit.study.errors import DataError, StudyError
from normkit.study.factory import is_factory
from normkit.study.models import build_model
from normkit.study.task import Classification, accuracy, classification_loss

MOST_CLASSES = 100  # per training sample: what has more is no class number
RESIDENT_SHARE = 0.25  # of a GPU's free memory that data may take, to be there from the start


@dataclass(frozen=True)
class NamedClassification(Classification):
    """A task from a data set and a model that are given by name.

    Attributes:
        model_name: Name of the model.
    """

    model_name: str = ""

    @property
    def data(self) -> Data:
        """The data set."""
        assert isinstance(self.train, TensorSamples)
        return self.train.data

    @property
    def note(self) -> str:
        """What the data set says of itself."""
        return self.data.note

    @property
    def data_label(self) -> str:
        """The option that chose the data."""
        return f"--data {self.data.name}"

    @property
    def model_label(self) -> str:
        """The option that chose the model."""
        return f"--model {self.model_name}"

    @property
    def model_summary(self) -> str:
        """The model's name."""
        return self.model_name

    @property
    def summary(self) -> str:
        """The data in one line, for the report."""
        shape = "x".join(map(str, self.data.input_shape))
        trained = len(self.data.train.labels.unique())
        few = f" ({trained} of them in training)" if trained < self.data.classes else ""
        note = f". {self.note}" if self.note else ""
        return f"{self.sizes} examples of {self.data.classes} classes{few}, {shape} inputs{note}"


def classification(
    data: Data, model: str, *, augmentation: Augmentation | None = None, label_smoothing: float = 0.0
) -> NamedClassification:
    """A task from a data set and a model that are given by name.

    Args:
        data: The data.
        model: Name of the model, see ``normkit.study.models.build_model``.
        augmentation: Random changes of training images.
        label_smoothing: Fraction of the label spread over all classes in training.
    """
    return NamedClassification(
        data.name,
        partial(build_model, model, input_shape=data.input_shape, classes=data.classes),
        TensorSamples(data, data.train, augmentation),
        TensorSamples(data, data.test),
        classification_loss,
        accuracy,
        validation=TensorSamples(data, data.validation) if data.validation is not None else None,
        metric="accuracy",
        unit="%",
        classes=data.classes,
        label_smoothing=label_smoothing,
        model_name=model,
    )


def load_classification(config: StudyConfig) -> Classification:
    """The task of a study's ``--data`` and ``--model`` with a validation split, on a GPU if it takes little of its memory.

    Raises:
        DataError: The data cannot be used.
        StudyError: It leaves no sample to train or to validate on.
    """
    if is_factory(config.data):  # one that draws its samples, or its splits, gives every process the same
        seed_all(0)
    data = load_data(
        config.data,
        image_column=config.image_column,
        label_column=config.label_column,
        image_size=config.image_size,
        train_split=config.train_split,
        limit=config.limit,
    ).scaled(config.scaling)
    try:
        train, validation = data.split_validation(config.validation_amount)
    except DataError as error:
        raise StudyError(f"--validation {config.validation:g}: {error}") from error
    data = replace(data, train=train, validation=validation)
    if config.device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(config.device)
        if sum(split.nbytes for split in (train, validation, data.test)) < RESIDENT_SHARE * free:
            data = data.to(config.device)
    return classification(data, config.model, augmentation=config.augmentation, label_smoothing=config.label_smoothing)


def check_classes(task: NamedClassification) -> None:
    """Check that the labels are classes.

    Raises:
        StudyError: All are one class, or they are identifiers.
    """
    labels, classes = task.data.train.labels, task.data.classes
    if len(labels.unique()) < 2:
        raise StudyError(f"{task.data_label}: all training examples are of one class; give examples of two or more")
    if classes > MOST_CLASSES * len(labels):
        raise StudyError(
            f"{task.data_label}: its {len(labels)} training examples have labels up to {classes - 1}; number the classes "
            "0, 1, 2 ..."
        )


def check_fit(task: NamedClassification, model: nn.Module, device: str) -> None:
    """Try a model on two samples.

    Args:
        task: The task.
        model: Its model, left as it was.
        device: Where the model is.

    Raises:
        StudyError: It cannot take them, or does not give logits of their classes.
    """
    data = task.data
    sample = data.normalise(data.train.examples(slice(2))[0].to(device))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(sample)
        model.train(was_training)
    except (Exception, SystemExit) as error:
        raise StudyError(
            f"{task.model_label}: cannot take inputs of shape {tuple(sample.shape)} from {task.data_label} "
            f"({type(error).__name__}: {error}); give a model that fits the data"
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape != (len(sample), data.classes):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise StudyError(
            f"{task.model_label}: its output is {found} where {task.data_label} with {data.classes} classes needs "
            f"{(len(sample), data.classes)}; build the model with `classes` outputs"
        )


def check_augmentation(task: NamedClassification, augmentation: Augmentation) -> None:
    """Check that the inputs can be augmented.

    Raises:
        StudyError: They are no images, or too small.
    """
    shape = task.data.input_shape
    if len(shape) != 3 or augmentation.crop >= min(shape[1:]):
        raise StudyError(
            f"--flip, --crop: {task.data_label} has inputs of shape {shape}; they need images larger than the crop"
        )
