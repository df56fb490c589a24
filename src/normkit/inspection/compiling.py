"""What ``torch.compile`` has to know of layers that are observed through hooks."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def disable_dynamo(function: _Function) -> _Function:
    """Keep ``function``, which has effects beside its result, out of compiled graphs.

    ``torch.compiler.disable`` imports the compiler at once, a second that ``import normkit`` must not cost; this is what
    torch's own optimizers use, which import it with their first step.
    """

    def call(*args: Any, **kwargs: Any) -> Any:  # torch notes something on what it gets, and a method takes no notes
        return function(*args, **kwargs)

    outside = torch._disable_dynamo(call)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(function)
    def choose(
        *args: Any, **kwargs: Any
    ) -> Any:  # in eager mode torch's guard is a third of a small layer's statistics
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return choose  # pyright: ignore[reportReturnType]


def guard_hooks() -> None:
    """Let compiled graphs tell models apart that differ by their hooks alone; call it before a hook is registered.

    By default the graph of such a model serves the other, whose hooks then never run. What was compiled before has no guards
    for hooks, so the first call in a process drops it; it is compiled anew when it is next needed.
    """
    import torch._dynamo  # a second, which an optimizer costs anyway

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
