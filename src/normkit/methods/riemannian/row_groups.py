"""Parameter groups of SGD-G and Adam-G: what is refused, and filters brought to length 1 (arXiv 1709.09603)."""

import math
from typing import Any

import torch

from normkit.methods.riemannian.filters import local, wide
from normkit.moments import statistics_dtype


def check_group(group: dict[str, Any], where: str) -> None:
    """Say what is wrong with a group before anything is changed.

    Args:
        group: The group, defaults filled in.
        where: What to call it.

    Raises:
        ValueError: An option is out of range, or a weight of a manifold group has no filters to put on the sphere.
    """
    for option, low, high in (
        ("lr", 0, math.inf),
        ("momentum", 0, 1),
        ("max_norm", 0, math.inf),
        ("orthogonality", 0, math.inf),
        ("weight_decay", 0, math.inf),
        ("eps", 0, math.inf),
    ):
        if not low <= group.get(option, low) <= high:
            raise ValueError(f"{where}: {option}={group[option]} must be between {low} and {high}")
    if group["max_norm"] == 0:
        raise ValueError(f"{where}: max_norm=0 would stop all filters; use math.inf for no bound")
    if not all(0 <= beta < 1 for beta in group.get("betas", ())):
        raise ValueError(f"{where}: betas={group['betas']} must be at least 0 and below 1")
    for index, p in enumerate(group["params"] if group["manifold"] else ()):
        what = f"{where}, parameter {group['param_names'][index] if 'param_names' in group else index}"
        if p.ndim < 2 or not p.is_floating_point():
            raise ValueError(
                f"{what}: shape {tuple(p.shape)}, {p.dtype} has no real filters to put on the sphere; put it in a "
                "group with manifold=False (FSDP version 1 flattens weights: use fully_shard, which keeps filters)"
            )
        if any(getattr(placement, "dim", 0) != 0 for placement in getattr(p, "placements", ())):
            raise ValueError(
                f"{what}: placements {p.placements} cut through filters; shard dimension 0, or manifold=False"
            )
        lengths = torch.linalg.vector_norm(
            local(p.detach()), dim=tuple(range(1, p.ndim)), dtype=statistics_dtype(p.dtype)
        )
        bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{what}: filter {bad[0]} ({len(bad)} in all) has length {lengths[bad[0]].item()} and so no direction; "
                "initialise it, or put the weight in a group with manifold=False"
            )


@torch.no_grad()
def normalize_group(group: dict[str, Any]) -> None:
    """Bring the filters of a manifold group to length 1."""
    for p in group["params"] if group["manifold"] else ():
        y = wide(local(p))
        local(p).copy_(y / torch.linalg.vector_norm(y, dim=tuple(range(1, p.ndim)), keepdim=True))
