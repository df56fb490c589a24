"""Segmentation of 3-D volumes at batch size 1, with brightness that varies and with absolute intensity that matters.

The network, loss and volumes are those of docs/examples/tasks/volumes.py. Three sets of volumes train, choose the learning
rates and judge. ``task`` is that of the example: brightness and contrast differ from volume to volume and mean nothing. In
``intensity``, as in computed tomography, the intensity is absolute: each volume has two ellipsoids, each 0.8 (healthy) or 1.2
(lesion) above a background of 0, and only lesions are to be found. The noise differs between volumes, so that it tells nothing
about the scale. A network whose normalization divides each volume by its own deviation cannot tell two lesions from two healthy
ellipsoids; ``instance`` and ``group`` do, and so does ``batch`` in training at batch size 1.

At batch size 1 ``batch`` trains with each volume's own statistics and is judged with running ones. Judged with each volume's own
statistics it is ``instance``: a comparison with ``batch`` alone would blame normalization for a mismatch of statistics.

The score is Dice over the voxels of all volumes together, as some volumes of ``intensity`` have no lesion.

    M=none,batch,instance,group,group+ws,bnp,group+bnp,batchless
    normkit compare --task benchmarks/studies/volumes.py:task --methods $M --batch-sizes 1 --budget 1000 --seeds 5
    normkit compare --task benchmarks/studies/volumes.py:intensity --methods $M --batch-sizes 1 --budget 1000 --seeds 5

Each takes about 30 core-minutes. Longer: ``--budget 10000``, ``--seeds 10``.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import normkit
from normkit.study.factory import load_factory

_EXAMPLE = Path(__file__).parents[2] / "docs/examples/tasks/volumes.py:task"
example = load_factory(str(_EXAMPLE), "task", lambda found: isinstance(found, normkit.Task))
Volumes = type(example.train)

SIDE = 16
HEALTHY, LESION = 0.8, 1.2


class Scans(Dataset[tuple[Tensor, Tensor]]):
    """Volumes of two ellipsoids each, and the masks of those that are lesions; each made from its own seed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + index)
        grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
        volume, mask = torch.zeros(2, 1, SIDE, SIDE, SIDE)
        for side in (-0.5, 0.5):  # one on each side: the two do not overlap
            place, size = (torch.rand(3, 1, 1, 1, generator=generator) for _ in range(2))
            centre = 0.8 * place - 0.4
            centre[0] = side
            inside = ((grid - centre) / (0.25 + 0.25 * size)).square().sum(0, keepdim=True) < 1
            lesion = torch.rand((), generator=generator) < 0.5
            volume[inside] = LESION if lesion else HEALTHY
            mask[inside] = float(lesion)
        noise = 0.2 + 0.3 * torch.rand((), generator=generator)
        return volume + noise * torch.randn(volume.shape, generator=generator), mask


def dice(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Overlap of prediction and mask over all voxels, ``2 |A and B| / (|A| + |B|)``."""
    both, total = 0.0, 0.0
    for volumes, masks in batches:
        found = (model(volumes) > 0).float()
        both += float((found * masks).sum())
        total += float((found + masks).sum())
    return 2 * both / max(total, 1)


task = replace(example, train=Volumes(200, 0), validation=Volumes(100, 20_000), test=Volumes(100, 10_000), score=dice)
intensity = replace(
    task,
    name="volumes with absolute intensity",
    train=Scans(200, 0),
    validation=Scans(100, 20_000),
    test=Scans(100, 10_000),
)
