"""The order in which a trial sees its examples, from the seed and the position in the sequence alone.

Every method and every batch size sees the same examples, and a trial resumes at any position.
"""

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator of its own for each purpose and epoch, so that nothing else that draws can shift its sequence."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, epoch))


def seed_of(seed: int, purpose: str, place: int = 0) -> int:
    """A seed of its own, of 63 bits, for each purpose and place.

    Args:
        seed: Seed of the run.
        purpose: What is drawn.
        place: Epoch, or position in the sequence.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_all(seed: int) -> None:
    """Seed the generators that a user's factory may draw from: Python's, NumPy's and torch's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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


def picks(size: int, budget: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and augmentation draws of each batch; epochs are chained, so that a batch may reach across their ends.

    Args:
        size: Number of training examples.
        budget: Number of examples a trial sees.
        batch_size: Examples per batch.
        seed: Seed of the order and of the draws.
        start: Examples already seen.

    Yields:
        int64 indices ``(batch,)``, and uniform numbers in [0, 1) of shape ``(batch, 3)``.
    """
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
        start: Examples already seen, to resume in mid-trial.

    Yields:
        int64 indices ``(batch,)``.

    Examples:
        >>> whole = torch.cat(list(stream(5, 12, 4, seed=0)))
        >>> torch.equal(whole, torch.cat(list(stream(5, 12, 3, seed=0)))), sorted(whole[:5].tolist())
        (True, [0, 1, 2, 3, 4])
    """
    for indices, _ in picks(size, budget, batch_size, seed, start):
        yield indices
