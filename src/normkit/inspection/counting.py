"""What torch.compile must leave alone."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def eager(function: _Function) -> _Function:
    """Keep ``function``, which has effects beside its result, out of compiled graphs.

    ``torch.compiler.disable`` imports the compiler at once, a second that ``import normkit`` must not cost; this is what
    torch's own optimizers use, which import it with their first step.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # torch notes something on what it gets, and a method takes no notes
        return function(*args, **kwargs)

    return torch._disable_dynamo(call)  # pyright: ignore[reportReturnType, reportPrivateImportUsage]
