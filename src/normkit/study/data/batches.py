"""Batches on the training device: drawn, augmented, normalised.

Order and augmentation depend on the seed and on the position in the sequence alone, so every method and every batch size
sees the same examples with the same augmentation.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from normkit.study.data.augmentation import Augmentation, augment
from normkit.study.data.dataset import Data, Split
from normkit.study.data.sampling import picks

BLOCK = 2**18  # values of the inputs (1 MiB) prepared in one call; batches are cut from them


def batches(
    data: Data,
    split: Split,
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
    for indices, draws in picks(len(split), budget, together * batch_size, seed, start):
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
    data: Data, split: Split, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples of a split once, in their order, normalised on ``device``.

    Yields:
        (inputs, labels) on ``device``.
    """
    for start in range(0, len(split), batch_size):
        inputs, labels = split.examples(slice(start, start + batch_size))
        yield data.normalise(inputs.to(device)), labels.to(device)
