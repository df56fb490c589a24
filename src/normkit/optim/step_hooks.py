"""Work that must happen right before an optimizer's step, in any training loop.

``optimizer.step()`` and ``optimizer.step(closure)`` are different: with a closure, forward and backward run INSIDE the step,
after its pre-hooks. ``before_step`` serves both. What accumulates between steps follows the gradients: it is dropped
whenever ``optimizer.zero_grad()`` drops them (a step skipped by a GradScaler, say).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def effective_lr(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """How far the optimizer carries a parameter of ``group`` along a lasting gradient: learning rate over 1 - momentum.

    Where a fused optimizer under AMP unscales the gradients itself, they are still scaled here. A momentum of 1, which
    carries without end, counts as 0.999.
    """
    rate = group.get("lr", 0.0) / max(1 - group.get("momentum", 0.0), 1e-3)
    scale = getattr(optimizer, "grad_scale", None)
    return rate if scale is None else rate / scale


class StepHandle:
    """Removes what ``before_step`` installed."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "StepHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def before_step(
    optimizer: Optimizer,
    prepare: Callable[[], None],
    *,
    after: Callable[[], None] | None = None,
    discard: Callable[[], None] | None = None,
    owner: str = "normkit",
) -> StepHandle:
    """Call ``prepare`` between backward and the optimizer's update, closures included.

    Args:
        optimizer: Any optimizer that evaluates its closure at most once per step.
        prepare: Called when all gradients of the step are there and before the update.
        after: Called after the update.
        discard: Called when ``optimizer.zero_grad()`` drops the gradients.
        owner: Who asks, for error messages.

    Returns:
        A handle whose ``remove()`` takes everything off again.

    Raises:
        ValueError: The optimizer evaluates its closure several times per step (LBFGS).
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{owner} cannot be attached to LBFGS: it evaluates its closure several times per step, so there is no single "
            "gradient to work on; use an optimizer that steps once per call (SGD, Adam, ...)"
        )

    def pre(
        opt: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        if closure is None:
            prepare()
            return None
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    f"{type(opt).__name__} evaluated its closure {calls} times in one step; {owner} works with optimizers "
                    "that evaluate it once (detach it with handle.remove(), or use another optimizer)"
                )
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                prepare()
            return loss

        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    undo: list[Callable[[], None]] = [optimizer.register_step_pre_hook(pre).remove]
    if after is not None:
        finish = after
        undo.append(optimizer.register_step_post_hook(lambda *_: finish()).remove)
    if discard is not None:
        undo.append(_on_zero_grad(optimizer, discard))
    return StepHandle(undo)


def _on_zero_grad(optimizer: Optimizer, discard: Callable[[], None]) -> Callable[[], None]:
    """Call ``discard`` with every ``zero_grad``; the wrapper is an instance attribute, so copies of the optimizer lack it."""
    previous = optimizer.zero_grad
    active = True

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        previous(*args, **kwargs)
        if active:
            discard()

    optimizer.zero_grad = zero_grad

    def undo() -> None:
        nonlocal active
        active = False  # another wrapper may lie above this one: then it stays, and passes through
        if vars(optimizer).get("zero_grad") is zero_grad:
            if getattr(previous, "__func__", None) is type(optimizer).zero_grad:
                del optimizer.zero_grad
            else:
                optimizer.zero_grad = previous

    return undo
