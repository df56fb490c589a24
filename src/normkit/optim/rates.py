"""Warn when one learning rate is set for groups that have different ones."""

import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from normkit.optim.step_hooks import can_hook


class _Watch:
    """Step hook that warns, once, when all groups have the same learning rate."""

    def __init__(self, name: str, rates: list[float]) -> None:
        self.name, self.rates, self.warned = name, rates, False

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        rates = _rates(optimizer)
        if self.warned or len(rates) != len(self.rates) or len(set(rates)) != 1 or rates[0] == 0:
            return
        self.warned = True
        different = ", ".join(f"{rate:g}" for rate in dict.fromkeys(self.rates))
        warnings.warn(
            f"{self.name}: the parameter groups started with the learning rates {different}, and something has set all of them "
            f"to {rates[0]:g}, which undoes the method; let a scheduler multiply the rates, or set one per group: "
            'OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], ...)',
            stacklevel=3,
        )


def _rates(optimizer: Optimizer) -> list[float]:
    """The learning rates of the groups that hold parameters; none where one is a tensor, whose value costs a synchronisation."""
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups if group["params"]]
    return [] if any(rate is None or torch.is_tensor(rate) for rate in rates) else rates


def watch_rates(optimizer: Optimizer, name: str) -> None:
    """Warn at the first step before which all groups of ``optimizer`` were given the same learning rate.

    Does nothing where the groups have the same rate now. ``OneCycleLR`` and ``CyclicLR`` with one number, and loops that set
    ``group["lr"]`` for every group, do that. The watch does not travel to copies.

    Args:
        optimizer: Any optimizer.
        name: Of the method, for the message.
    """
    rates = _rates(optimizer)
    if len(set(rates)) > 1 and can_hook(optimizer):
        optimizer.register_step_pre_hook(_Watch(name, rates))
