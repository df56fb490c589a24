"""What torch.compile must leave alone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def eager(function: _Function) -> _Function:
    """Keep ``function``, which has effects beside its result, out of compiled graphs.

    ``torch.compiler.disable`` imports the compiler at once, a second that ``import evenkeel`` must not cost; this is what
    torch's own optimizers use, which import it with their first step.
    """
    return torch._disable_dynamo(function)  # pyright: ignore[reportReturnType, reportPrivateUsage]
