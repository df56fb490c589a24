"""Samples of any map-style dataset, fetched one by one and collated into micro-batches.

Each fetch begins with random number generators that are seeded by the seed and the position of its first sample in the
sequence. A dataset that augments at random gives the same samples to every method, in every process and after a resume.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from normkit.study.data.sampling import seed_of
from normkit.study.data.structure import leaves
from normkit.study.errors import DataError


class Request(NamedTuple):
    """The samples of one step: the position of the first in the sequence, and the indices of each micro-batch."""

    position: int
    groups: tuple[tuple[int, ...], ...]


class MicroBatch(NamedTuple):
    """A collated batch and its number of samples."""

    batch: Any
    samples: int


@dataclass(frozen=True)
class Fetcher(Dataset[Any]):
    """Turns requests into collated micro-batches.

    Attributes:
        dataset: Any map-style dataset.
        name: What a message calls it.
        seed: Seed of random changes of its samples.
        collate: Makes a batch from a list of samples; None for torch's own.
    """

    dataset: Any
    name: str
    seed: int = 0
    collate: Callable[[list[Any]], Any] | None = None

    def __getitem__(self, request: Request) -> list[MicroBatch] | DataError:
        """The collated micro-batches; an error is returned, since a worker process would wrap it in a traceback."""
        try:
            with _seeded(seed_of(self.seed, "samples", request.position)):
                return [self._micro_batch(group) for group in request.groups]
        except DataError as error:
            return error

    def _micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        return MicroBatch(self._collated([self._sample(i) for i in indices], indices), len(indices))

    def _sample(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise DataError(
                f"{self.name}[{index}] raised {type(error).__name__}: {error}; correct or leave out that sample"
            ) from error

    def _collated(self, samples: list[Any], indices: Sequence[int]) -> Any:
        try:
            return (self.collate or default_collate)(samples)
        except Exception as error:
            raise DataError(f"{self.name}: {_misfit(samples, indices, error)}; give Task(collate=...)") from error


class _seeded:
    """Seeds the generators of Python, NumPy and torch; afterwards torch's goes on as if nothing had been drawn."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._seed)
        np.random.seed(self._seed & 0xFFFFFFFF)
        random.seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self._state)


def _misfit(samples: Sequence[Any], indices: Sequence[int], error: Exception) -> str:
    """Say which samples do not collate: the field and both shapes, where shapes are the reason."""
    first = {place: tuple(leaf.shape) for place, leaf in leaves(samples[0]) if isinstance(leaf, Tensor | np.ndarray)}
    for index, sample in zip(indices[1:], samples[1:], strict=True):
        for place, leaf in leaves(sample):
            if isinstance(leaf, Tensor | np.ndarray) and place in first and tuple(leaf.shape) != first[place]:
                shapes = f"{first[place]} and {tuple(leaf.shape)}"
                return f"samples {indices[0]} and {index} do not collate: {f'field {place} ' * bool(place)}has shapes {shapes}"
    reason = " ".join(str(error).split())[:150]
    return f"samples {', '.join(map(str, indices[:4]))} do not collate ({type(error).__name__}: {reason})"


def fetched(fetcher: Fetcher, requests: Iterator[Request], workers: int = 0) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each request, in order.

    Args:
        fetcher: Fetches and collates.
        requests: What to fetch.
        workers: Processes that fetch ahead; 0 to fetch in this one. The samples are the same.

    Yields:
        Those of one request.

    Raises:
        DataError: A sample cannot be read, or samples do not collate.
    """
    made = map(fetcher.__getitem__, requests) if workers == 0 else _loader(fetcher, requests, workers)
    for batches in made:
        if isinstance(batches, DataError):
            raise batches
        yield batches


def _loader(fetcher: Fetcher, requests: Iterator[Request], workers: int) -> Iterator[Any]:
    generator = torch.Generator()  # of worker seeds, which then do not come from the trial's own random numbers
    options: dict[str, Any] = {"batch_size": None, "sampler": requests, "collate_fn": _as_it_is, "generator": generator}
    return iter(DataLoader(fetcher, num_workers=workers, **options))


def _as_it_is(batches: Any) -> Any:
    return batches
