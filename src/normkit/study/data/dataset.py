"""A data set for all trials: splits of plain tensors, and their normalization."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from normkit.study.config import Scaling
from normkit.study.data.augmentation import Augmentation
from normkit.study.data.sampling import stratified
from normkit.study.errors import DataError

SAMPLE = 10_000  # images whose channels' mean and standard deviation normalise all


@dataclass(frozen=True)
class Split:
    """Examples and their classes: all of what is stored, or some of its rows, of which no copy is made.

    Attributes:
        stored: uint8 images ``(M, C, H, W)``, or floating-point inputs ``(M, ...)``; may be memory-mapped and larger than memory.
        labels: Class of each example, int64 ``(N,)``.
        rows: Row of ``stored`` of each example, int64 ``(N,)``; None where all are examples in their order.
    """

    stored: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def inputs(self) -> Tensor:
        """All inputs ``(N, ...)`` as one tensor; a copy, in memory, where the examples are some rows."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return len(self) * self.stored[:1].nbytes

    def examples(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the samples at ``indices``; nothing else is read."""
        return self.stored[indices if self.rows is None else self.rows[indices]], self.labels[indices]

    def take(self, indices: Tensor) -> "Split":
        """The split of the examples at ``indices``; their inputs stay where they are."""
        return Split(self.stored, self.labels[indices], indices if self.rows is None else self.rows[indices])

    def to(self, device: torch.device | str) -> "Split":
        """A copy of the examples on another device."""
        return Split(self.inputs.to(device), self.labels.to(device))


def held_out(amount: float | int, total: int) -> int:
    """Number of training samples that are held out for validation.

    Args:
        amount: A fraction in (0, 1), or a number of samples.
        total: Number of training samples.

    Raises:
        DataError: One of the two splits would be empty.
    """
    count = round(amount * total) if isinstance(amount, float) else amount
    if not 0 < count < total:
        raise DataError(
            f"validation amount {amount!r} of {total} training examples leaves an empty split; choose a fraction between 0 "
            "and 1 or a smaller number of examples"
        )
    return count


@dataclass(frozen=True)
class Data:
    """A classification data set.

    Attributes:
        name: What the user called it.
        train: Training split.
        test: Test split, for final runs only.
        classes: Number of classes.
        mean: Mean per channel (dimension 1 of the inputs) in the unit of the stored inputs, shape ``(C,)`` or ``(1,)``.
        std: Standard deviation likewise.
        note: What a reader of a figure must know about this data, or an empty string.
        validation: The user's own validation split, or None: then it is cut from ``train``.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: Tensor
    std: Tensor
    note: str = ""
    validation: Split | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension."""
        return tuple(self.train.stored.shape[1:])

    def normalise(self, inputs: Tensor) -> Tensor:
        """Stored inputs as the fp32 tensor a model gets: ``(inputs - mean) / std``, on the device of ``inputs``."""
        shape = (1, -1) + (1,) * (inputs.dim() - 2)
        mean, std = (t.to(inputs.device).reshape(shape) for t in (self.mean, self.std))
        return (inputs.float() - mean).div_(std)

    def scaled(self, scaling: Scaling) -> "Data":
        """The same images under another normalisation: of their channels' statistics, to [0, 1] or to [-1, 1].

        Raises:
            DataError: The inputs are no images, so that their range is not known.
        """
        if scaling == "standardized":
            return self
        if self.train.stored.dtype != torch.uint8:
            raise DataError(f"scaling {scaling!r}: data {self.name!r} has no 8-bit images; leave it out")
        half = torch.full((1,), 127.5)
        return (
            replace(self, mean=half, std=half) if scaling == "symmetric" else replace(self, mean=0 * half, std=2 * half)
        )

    def split_validation(self, amount: float | int = 0.2, seed: int = 0) -> tuple[Split, Split]:
        """Training split without, and validation split with, ``amount`` of its examples; classes keep their shares.

        No input is read or copied: both are rows of what is stored.

        Args:
            amount: A fraction in (0, 1), or a number of examples. A validation split that came with the data is used as
                it is.
            seed: Seed of the choice.

        Returns:
            (train, validation).

        Raises:
            DataError: One of the two would be empty.
        """
        if self.validation is not None:
            return self.train, self.validation
        chosen = stratified(self.train.labels, held_out(amount, len(self.train)), seed)
        keep = torch.ones(len(self.train), dtype=torch.bool)
        keep[chosen] = False
        return self.train.take(keep.nonzero().squeeze(1)), self.train.take(chosen)

    def to(self, device: torch.device | str) -> "Data":
        """The same data with all splits on ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            test=self.test.to(device),
            validation=self.validation.to(device) if self.validation is not None else None,
        )


@dataclass(frozen=True)
class TensorSamples(Dataset[tuple[Tensor, Tensor]]):
    """A split as a dataset of (normalised input, class) that batches read in whole blocks, not sample by sample.

    Attributes:
        data: Whose normalisation is used.
        split: The samples.
        augmentation: Random changes of training images, or None.
    """

    data: Data
    split: Split
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.split.examples(slice(index, index + 1))
        return self.data.normalise(inputs)[0], labels[0]


def make_data(name: str, train: Split, test: Split, *, validation: Split | None = None, note: str = "") -> Data:
    """Data whose uint8 images are normalised by the training split's channels; other inputs are left as they are."""
    if train.stored.dtype == torch.uint8:
        mean, std = _channel_moments(train)
    else:
        mean, std = torch.zeros(1), torch.ones(1)
    classes = 1 + max(int(split.labels.max()) for split in (train, test, validation) if split is not None)
    return Data(name, train, test, classes, mean, std, note, validation)


def _channel_moments(train: Split) -> tuple[Tensor, Tensor]:
    # Mean and standard deviation per channel, from exact sums of a stratified sample read in pieces.
    channels = train.stored.shape[1]
    values, total, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    for indices in stratified(train.labels, min(len(train), SAMPLE), 0).split(256):
        piece = train.examples(indices)[0].double().transpose(0, 1).reshape(channels, -1)
        values, total, squares = values + piece.shape[1], total + piece.sum(1), squares + piece.square().sum(1)
    mean = total / values
    return mean.float(), (squares / values - mean.square()).clamp(min=1e-6).sqrt().float()
