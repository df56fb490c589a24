"""An exponential moving average of a model's weights, evaluated in their place."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages all floating-point parameters and buffers, ``average <- d average + (1 - d) value``, once per step.

    The average lies beside the model as plain tensors, so it works whatever hooks, wrappers or optimizer the model has.

    Args:
        model: The model that is trained.
        decay: Final value of ``d``, in (0, 1); at step t it is at most ``(1 + t) / (10 + t)``, which forgets the start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._live = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present values into the average; call it after every optimizer step."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, [t.detach() for t in self._live], weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place(self) -> Generator[None, None, None]:
        """Within the block the model has the averaged values; afterwards its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self._live, self._average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"steps": self.steps, "average": list(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.steps = state["steps"]
        values: list[Tensor] = state["average"]
        for average, value in zip(self._average, values, strict=True):
            average.copy_(value)
