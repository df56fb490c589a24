"""Choose the weights of a run that are evaluated: their exponential moving average, or the best by validation score."""

from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
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
        """Add the model's present values to the average; call it after every optimizer step."""
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
        """Return the state for a checkpoint."""
        return {"steps": self.steps, "average": list(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state_dict``."""
        self.steps = state["steps"]
        values: list[Tensor] = state["average"]
        for average, value in zip(self._average, values, strict=True):
            average.copy_(value)


class BestWeights:
    """Keeps one copy of a model's state: the one with the best validation score so far, the earliest of equals.

    Args:
        model: The model that is trained; its whole state dict is kept, running statistics included.
        higher_is_better: Whether a higher score is a better one.

    Attributes:
        score: Validation score of the state that is kept, or None before the first one.
        step: The optimizer step after which it was taken, 0 before the first one.
    """

    def __init__(self, model: nn.Module, higher_is_better: bool = True) -> None:
        self.score: float | None = None
        self._sign = 1 if higher_is_better else -1
        self.step = 0
        self._model = model
        self._state: dict[str, Any] = {}

    def offer(self, score: float, step: int) -> None:
        """Keep the model's present state if its score is better than that of the one kept."""
        if self.score is not None and self._sign * score <= self._sign * self.score:
            return
        self.score, self.step = score, step
        self._state = {}  # let go of the old copy before there is a new one
        self._state = deepcopy(self._model.state_dict())

    def restore(self) -> None:
        """Give the model the state that is kept."""
        self._model.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"score": self.score, "step": self.step, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state_dict``."""
        self.score, self.step, self._state = state["score"], state["step"], state["state"]
