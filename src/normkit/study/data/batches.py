"""The order in which a trial sees its examples, and their augmentation on the training device.

Order and augmentation depend on the seed and on the position in the sequence alone: every method and every batch size
sees the same examples, changed in the same way, and a trial can start again at any position.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from normkit.study.data.load import Data, Split


BLOCK = (
    2**18
)  # values of the inputs (1 MiB) that are prepared together, for a share of the calls: batches are cut from them


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed at random.

    Attributes:
        flip: Mirror left and right with probability 1/2.
        crop: Pad by this many pixels, reflecting, and cut the original size out at a random place.
    """

    flip: bool = False
    crop: int = 0

    def __bool__(self) -> bool:
        return self.flip or self.crop > 0


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator of its own for each purpose and epoch, so that nothing else that draws can shift its sequence."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices, in rising order, of ``count`` examples drawn so that classes keep their shares (to within one example).

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[stratified(labels, 3, seed=0)].tolist()
        [0, 0, 1]
    """
    order = torch.randperm(len(labels), generator=generator(seed, "stratified"))
    shuffled = labels[order]
    by_class = order[torch.argsort(shuffled, stable=True)]
    sizes = torch.bincount(labels)
    exact = sizes.double() * count / len(labels)
    take = exact.floor().long()
    remainder = torch.argsort(exact - take, descending=True, stable=True)[: count - int(take.sum())]
    take[remainder] += 1
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(labels)) - starts.repeat_interleave(sizes)
    return by_class[rank < take.repeat_interleave(sizes)].sort().values


def _picks(size: int, budget: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    # Index and augmentation draws of each batch: epochs are chained, so that batches may reach across their ends.
    indices, draws = torch.empty(0, dtype=torch.int64), torch.empty(0, 3)
    epoch, skip = divmod(start, size)
    while start < budget:
        want = min(batch_size, budget - start)
        while len(indices) < want:
            order = torch.randperm(size, generator=generator(seed, "order", epoch))
            noise = torch.rand(size, 3, generator=generator(seed, "augmentation", epoch))
            indices, draws = torch.cat([indices, order[skip:]]), torch.cat([draws, noise[skip:]])
            epoch, skip = epoch + 1, 0
        yield indices[:want], draws[:want]
        indices, draws, start = indices[want:], draws[want:], start + want


def stream(size: int, budget: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Indices of each batch until ``budget`` examples were seen; each epoch is a new permutation.

    Args:
        size: Number of training examples.
        budget: Number of examples a trial sees; the last batch is shorter where the batch size does not divide it.
        batch_size: Examples per batch.
        seed: Seed of the order.
        start: Examples already seen, to go on in mid-trial.

    Yields:
        int64 indices ``(batch,)``.

    Examples:
        >>> whole = torch.cat(list(stream(5, 12, 4, seed=0)))
        >>> torch.equal(whole, torch.cat(list(stream(5, 12, 3, seed=0)))), sorted(whole[:5].tolist())
        (True, [0, 1, 2, 3, 4])
    """
    for indices, _ in _picks(size, budget, batch_size, seed, start):
        yield indices


def augment(images: Tensor, augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Flip and crop each image of a batch by its own draws.

    Padding and cutting out is one gather: row ``r`` of the result is row ``reflect(r + offset - crop)`` of the image.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        augmentation: What to do.
        draws: Uniform numbers in [0, 1), ``(N, 3)``: vertical offset, horizontal offset, flip.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: The inputs are no images, or smaller than the padding.
    """
    if images.dim() != 4:
        raise ValueError(
            f"augmentation needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}; switch it off"
        )
    n, _, height, width = images.shape
    if augmentation.crop >= min(height, width):
        raise ValueError(
            f"crop {augmentation.crop} is too large for {height}x{width} images; choose less than their side"
        )
    device = images.device
    offsets = (draws[:, :2] * (2 * augmentation.crop + 1)).long() - augmentation.crop
    rows = _reflect(torch.arange(height) + offsets[:, :1], height)
    columns = _reflect(torch.arange(width) + offsets[:, 1:], width)
    if augmentation.flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    flat = (rows[:, :, None] * width + columns[:, None, :]).reshape(n, 1, -1).to(device, non_blocking=True)
    return images.flatten(2).gather(2, flat.expand(-1, images.shape[1], -1)).reshape(images.shape)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond the border mirrored at it, the border itself not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def batches(
    data: "Data",
    split: "Split",
    *,
    batch_size: int,
    budget: int,
    seed: int,
    device: torch.device | str = "cpu",
    augmentation: Augmentation | None = None,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, augmented and normalised on ``device``, until ``budget`` examples were seen.

    Args:
        data: Whose normalisation is used.
        split: What to train on.
        batch_size: Examples per batch.
        budget: Number of examples.
        seed: Seed of order and augmentation.
        device: Training device; uint8 goes there, and becomes fp32 there.
        augmentation: What to do to images, or None.
        start: Examples already seen.
        share: Rank and number of ranks that share each batch.

    Yields:
        (inputs, labels) of this rank's share, on ``device``.
    """
    rank, ranks = share
    together = max(1, BLOCK // (batch_size * math.prod(data.input_shape)))
    for indices, draws in _picks(len(split), budget, together * batch_size, seed, start):
        sizes = [len(part) for part in indices.split(batch_size)]
        if ranks > 1:
            indices, draws = (
                torch.cat([batch.tensor_split(ranks)[rank] for batch in whole.split(batch_size)])
                for whole in (indices, draws)
            )
            sizes = [size // ranks + (rank < size % ranks) for size in sizes]
        inputs, labels = (part.to(device) for part in split.examples(indices.to(split.labels.device)))
        if augmentation:
            inputs = augment(inputs, augmentation, draws)
        yield from zip(data.normalise(inputs).split(sizes), labels.split(sizes), strict=True)


def evaluation_batches(
    data: "Data", split: "Split", *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples of a split once, in their order, normalised on ``device``.

    Yields:
        (inputs, labels) on ``device``.
    """
    for start in range(0, len(split), batch_size):
        inputs, labels = split.examples(slice(start, start + batch_size))
        yield data.normalise(inputs.to(device)), labels.to(device)
