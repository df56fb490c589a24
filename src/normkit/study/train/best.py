"""The weights of a run with the best validation accuracy, judged in place of the last ones."""

from copy import deepcopy
from typing import Any

from torch import nn


class BestWeights:
    """Keeps one copy of a model's state: the one with the highest validation accuracy so far, the earliest of equals.

    Args:
        model: The model that is trained; its whole state dict is kept, running statistics included.

    Attributes:
        accuracy: Validation accuracy of the state that is kept, or None before the first one.
        step: The optimizer step after which it was taken, 0 before the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.accuracy: float | None = None
        self.step = 0
        self._model = model
        self._state: dict[str, Any] = {}

    def offer(self, accuracy: float, step: int) -> None:
        """Keep the model's present state if its accuracy is higher than that of the one kept."""
        if self.accuracy is not None and accuracy <= self.accuracy:
            return
        self.accuracy, self.step = accuracy, step
        self._state = {}  # let go of the old copy before there is a new one
        self._state = deepcopy(self._model.state_dict())

    def restore(self) -> None:
        """Give the model the state that is kept."""
        self._model.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"accuracy": self.accuracy, "step": self.step, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.accuracy, self.step, self._state = state["accuracy"], state["step"], state["state"]
