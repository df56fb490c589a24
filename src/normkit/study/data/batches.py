"""Batches on the training device, in micro-batches: from tensors in whole blocks, from any other dataset sample by sample.

Order and augmentation depend on the seed and on the position in the sequence alone, so every method and every batch size
sees the same samples.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from normkit.study.data.augmentation import augment
from normkit.study.data.dataset import TensorSamples
from normkit.study.data.samples import Fetcher, MicroBatch, Request, fetched
from normkit.study.data.sampling import picks, stream
from normkit.study.data.structure import tensors, to_device

BLOCK = 2**18  # values of the inputs (1 MiB) prepared in one call; batches are cut from them
AHEAD = 16  # small batches fetched in a row: between two steps, the caches hold nothing of what a fetch needs


def batches(
    dataset: Any,
    *,
    batch_size: int,
    budget: int,
    seed: int,
    device: torch.device | str = "cpu",
    start: int = 0,
    share: tuple[int, int] = (0, 1),
    micro_batch: int = 0,
    augmented: bool = True,
    collate: Callable[[list[Any]], Any] | None = None,
    workers: int = 0,
) -> Iterator[list[MicroBatch]]:
    """Training batches on ``device``, until ``budget`` samples were seen.

    Args:
        dataset: What to train on; ``TensorSamples`` are read in blocks, any other dataset sample by sample.
        batch_size: Samples per batch.
        budget: Number of samples.
        seed: Seed of order and augmentation.
        device: Training device.
        start: Samples already seen.
        share: Rank and number of ranks that share each batch.
        micro_batch: Samples per micro-batch; 0 for whole batches.
        augmented: Whether ``TensorSamples`` are augmented as they say.
        collate: Makes a batch from a list of samples; None for torch's own.
        workers: Processes that fetch samples ahead; 0 to fetch in this one.

    Yields:
        The micro-batches of this rank's share of each batch.
    """
    if isinstance(dataset, TensorSamples):
        dataset = dataset if augmented else replace(dataset, augmentation=None)
        whole = _blocks(dataset, batch_size, budget, seed, device, start, share)
        yield from (_split(batch, micro_batch) for batch in whole) if micro_batch else ([batch] for batch in whole)
        return
    requests = _requests(len(dataset), batch_size, budget, seed, start, share, micro_batch)
    made = fetched(Fetcher(dataset, "train", seed, collate), requests, workers)
    yield from _in_a_row(
        [MicroBatch(to_device(batch, device), samples) for batch, samples in micros] for micros in made
    )


def _in_a_row(steps: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
    # The same, fetched several at a time, as long as they are small.
    for first in steps:
        values = sum(tensor.numel() for micro in first for tensor in tensors(micro.batch)) or BLOCK  # of unknown size
        together = min(AHEAD, BLOCK // values)
        yield from chain([first], list(islice(steps, max(0, together - 1))))


def _blocks(
    dataset: TensorSamples,
    batch_size: int,
    budget: int,
    seed: int,
    device: torch.device | str,
    start: int,
    share: tuple[int, int],
) -> Iterator[MicroBatch]:
    # Each batch in one piece; several batches are read, moved, augmented and normalised in one call.
    rank, ranks = share
    data, split = dataset.data, dataset.split
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
        if dataset.augmentation:
            inputs = augment(inputs, dataset.augmentation, draws)
        pairs = zip(data.normalise(inputs).split(sizes), labels.split(sizes), strict=True)
        yield from map(MicroBatch, pairs, sizes)


def _split(whole: MicroBatch, size: int) -> list[MicroBatch]:
    parts: tuple[tuple[Tensor, ...], ...] = tuple(tensor.split(size) for tensor in whole.batch)
    return [MicroBatch(pair, len(pair[1])) for pair in zip(*parts, strict=True)]


def _requests(
    length: int, batch_size: int, budget: int, seed: int, start: int, share: tuple[int, int], micro_batch: int
) -> Iterator[Request]:
    # What this rank fetches for each batch: its share, cut into micro-batches.
    rank, ranks = share
    for block in stream(length, budget, AHEAD * batch_size, seed, start):
        indices = block.tolist()
        for first in range(0, len(indices), batch_size):
            size, rest = divmod(min(batch_size, len(indices) - first), ranks)
            begin = first + size * rank + min(rank, rest)
            end = begin + size + (rank < rest)
            cuts = range(begin, max(end, begin + 1), micro_batch or max(1, end - begin))
            yield Request(start + begin, tuple(tuple(indices[cut : min(cut + cuts.step, end)]) for cut in cuts))
        start += len(indices)


def evaluation_batches(
    dataset: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    collate: Callable[[list[Any]], Any] | None = None,
    name: str = "split",
    workers: int = 0,
) -> Iterator[Any]:
    """All samples of a dataset once, in their order, on ``device``.

    Args:
        dataset: As for ``batches``; nothing is augmented.
        batch_size: Samples per batch.
        device: Where the batches go.
        collate: Makes a batch from a list of samples; None for torch's own.
        name: What a message calls the dataset.
        workers: Processes that fetch samples ahead; 0 to fetch in this one.

    Yields:
        Batches.
    """
    starts = range(0, len(dataset), batch_size)
    if isinstance(dataset, TensorSamples):
        for start in starts:
            inputs, labels = dataset.split.examples(slice(start, start + batch_size))
            yield dataset.data.normalise(inputs.to(device)), labels.to(device)
        return
    requests = (Request(start, (tuple(range(start, min(start + batch_size, len(dataset)))),)) for start in starts)
    for ((batch, _),) in fetched(Fetcher(dataset, name, 0, collate), requests, workers):
        yield to_device(batch, device)
