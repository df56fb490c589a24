"""Unit filters: weights put on the sphere, the network's function kept (arXiv 1709.09603)."""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normkit.inspection.graph import dataflow
from normkit.optim.invariance import Invariance, weight_users


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def normalize_filters(model: nn.Module, report: Mapping[str, Invariance]) -> None:
    """Bring the filters of all weights that the report puts on the manifold to length 1, in place.

    Running statistics of the normalizations they feed are scaled along, so that the network's function stays in
    train mode and in eval mode (up to the normalizations' epsilon, which weighs differently beside another scale). A warning
    names the weights for which that cannot be done; the choice is the user's then: another rule, or training on.

    Args:
        model: The model of the report.
        report: What [`normkit.scale_invariance`][] found.

    Raises:
        ValueError: A filter has no direction (length zero or not finite).
    """
    chosen = {name: model.get_parameter(name) for name, entry in report.items() if entry.manifold}
    shards = {name: torch.linalg.vector_norm(weight.flatten(1).double(), dim=1) for name, weight in chosen.items()}
    lengths = {name: _whole(length) for name, length in shards.items()}
    for name, length in lengths.items():
        bad = (~(length.isfinite() & (length > 0))).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name}: filter {bad[0]} ({len(bad)} in all) has length {length[bad[0]].item()} and so no direction; "
                "initialise it, or leave the weight out of the manifold"
            )
    feeders = Counter(part for entry in report.values() for part in entry.fed)
    users, flow = weight_users(model), dataflow(model)

    def takes_others(norm: str, layer: str) -> bool:
        return len(flow.calls(norm)) > len(flow.calls(layer))

    changed: list[str] = []
    for name, weight in chosen.items():
        length = lengths[name]
        moves = bool(((length - 1).abs() > 1e-6).any())
        local(weight).div_(local(shards[name]).to(weight.dtype).view(-1, *(1,) * (weight.ndim - 1)))
        if not moves:
            continue
        fed = report[name].fed
        if not report[name].invariant:
            changed.append(f"{name} ({report[name].reason})")
        elif (
            not fed
            or len(users[name]) > 1
            or any(feeders[part] > 1 or takes_others(part[0], users[name][0]) for part in fed)
        ):
            changed.append(
                f"{name} (eval mode only: its running statistics are shared; normkit.recalibrate renews them)"
            )
        else:
            bias = getattr(model.get_submodule(users[name][0]), "bias", None)
            for norm, offset in fed:
                _rescale_running(model.get_submodule(norm), length, bias, offset)
    if changed:
        shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        warnings.warn(
            f"unit filters change the network's function, at {len(changed)} of {len(chosen)} weights: {shown}; "
            "choose rule='exact', or train on from there",
            stacklevel=3,
        )


def _rescale_running(norm: Any, length: Tensor, bias: Tensor | None, offset: int) -> None:
    """Running statistics, from a channel on, for filters divided by ``length``; the layer's bias was not divided."""
    if getattr(norm, "running_mean", None) is None:
        return
    mean, variance = (t[offset : offset + len(length)] for t in (norm.running_mean, norm.running_var))
    length = length.to(mean.dtype)
    shift = torch.zeros_like(mean) if bias is None else _whole(bias).to(mean.dtype)
    mean.sub_(shift).div_(length).add_(shift)
    variance.div_(length.square())


def _whole(x: Any) -> Tensor:
    """All of a DTensor; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
