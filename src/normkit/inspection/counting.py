"""Count the rows of a layer's input, once per forward pass that trains."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def disable_dynamo(function: _Function) -> _Function:
    """Keep ``function``, which has effects beside its result, out of compiled graphs.

    ``torch.compiler.disable`` imports the compiler at once, a second that ``import normkit`` must not cost; this is what
    torch's own optimizers use, which import it with their first step.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # torch notes something on what it gets, and a method takes no notes
        return function(*args, **kwargs)

    return torch._disable_dynamo(call)  # pyright: ignore[reportReturnType, reportPrivateImportUsage]


_pauses = 0  # of the whole process, not of a thread: checkpointed forwards are recomputed on autograd's own threads


@contextmanager
def no_counting() -> Iterator[None]:
    """Let nothing inside be observed: for forward and backward passes that measure and do not train."""
    global _pauses  # noqa: PLW0603
    _pauses += 1
    try:
        yield
    finally:
        _pauses -= 1


def is_counting() -> bool:
    """Whether forward passes count at present; a layer spares itself the statistics when they do not."""
    return _pauses == 0


def on_first_backward(output: Tensor, count: Callable[[], None]) -> None:
    """Call ``count`` when, and only when, a gradient reaches ``output``; once, however many backward passes run.

    So evaluation and probing forwards never count, and a forward recomputed by activation checkpointing counts exactly
    once in both of its modes: reentrant (first pass without grad: nothing to flow back) and not (recomputed graph:
    never run backward).

    Args:
        output: Of a forward pass with gradients.
        count: What to call.
    """
    waiting = [count]

    def arrived(_: Tensor) -> None:
        if waiting:
            waiting.pop()()

    output.register_hook(arrived)
