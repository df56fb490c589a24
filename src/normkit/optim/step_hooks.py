"""Attach work that happens right before an optimizer's step, in any training loop.

``optimizer.step()`` and ``optimizer.step(closure)`` are different: with a closure, forward and backward run INSIDE the step,
after its pre-hooks. :func:`attach_to_step` serves both. What accumulates between steps follows the gradients: it is dropped
whenever ``optimizer.zero_grad()`` drops them (a step skipped by a GradScaler, say).
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_HANDLES = "_normkit_handles"
_HOOKS = tuple(
    f"_optimizer_{kind}_hooks" for kind in ("step_pre", "step_post", "state_dict_post", "load_state_dict_pre")
)


def effective_lr(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """Return how far the optimizer moves a parameter of ``group`` along a constant gradient: learning rate / (1 - momentum).

    Where a fused optimizer under AMP unscales the gradients itself, they are still scaled here. A momentum of 1, which
    moves without end, counts as 0.999.
    """
    rate = group.get("lr", 0.0) / max(1 - group.get("momentum", 0.0), 1e-3)
    scale = getattr(optimizer, "grad_scale", None)
    return rate if scale is None else rate / scale


class Stateful(Protocol):
    """An object whose state is saved in the optimizer's state_dict."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Load a state."""
        ...


Callback = Callable[[Optimizer], None]


class StepHandle:
    """An attachment to an optimizer; ``remove()`` detaches it.

    It is copied and pickled together with its optimizer, so that a model and an optimizer that are copied together train on
    alike. The callbacks must therefore be methods of objects that can be copied.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        key: str,
        prepare: Callback,
        after: Callback | None,
        discard: Callback | None,
        state: Stateful | None,
        on_remove: Callback | None,
        owner: Any,
    ) -> None:
        self.optimizer, self.key, self.attached, self.owner = optimizer, key, True, owner
        self._prepare, self._after, self._discard = prepare, after, discard
        self._state, self._on_remove = state, on_remove
        self._warned = self._skips = False
        self._install()

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        if not self.attached:
            return
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        attributes = vars(self.optimizer)
        # another wrapper may lie above this one: then it stays, and passes through
        if attributes.get("zero_grad") == self._zero_grad:
            if getattr(self._zero_grad_below, "__func__", None) is type(self.optimizer).zero_grad:
                del self.optimizer.zero_grad
            else:
                self.optimizer.zero_grad = self._zero_grad_below
        attributes[_HANDLES].remove(self)
        if not attributes[_HANDLES]:
            del attributes[_HANDLES], attributes["__getstate__"]
        if self._on_remove is not None:
            self._on_remove(self.optimizer)

    def __enter__(self) -> "StepHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_hooks", "_zero_grad_below")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.attached:
            self._install()

    def _install(self) -> None:
        """Hook into the optimizer, which in a copy may have no attributes yet: those set here stay."""
        attributes = vars(self.optimizer)
        self._hooks: list[RemovableHandle] = []
        for name, hook in zip(_HOOKS, (self._before_step, self._after_step, self._save, self._load), strict=True):
            hooks = attributes.setdefault(name, OrderedDict())
            self._hooks.append(RemovableHandle(hooks))
            hooks[self._hooks[-1].id] = hook
        self._zero_grad_below = self.optimizer.zero_grad
        self.optimizer.zero_grad = self._zero_grad
        handles = attributes.setdefault(_HANDLES, [])
        if self not in handles:
            handles.append(self)
        # torch's optimizers leave their hooks behind when they are copied or pickled
        attributes["__getstate__"] = partial(_with_handles, self.optimizer)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._check_privacy(optimizer)
        # a GradScaler lets a fused optimizer skip the step by itself, and does not call others at all
        infinite = getattr(optimizer, "found_inf", None)
        self._skips = infinite is not None and bool(infinite)
        if self._skips:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        if closure is None:
            self._prepare(optimizer)
            return None
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    f"{type(optimizer).__name__} evaluated its closure {calls} times in one step; {self.key} works with "
                    "optimizers that evaluate it once (detach it with handle.remove(), or use another optimizer)"
                )
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                self._prepare(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _check_privacy(self, optimizer: Optimizer) -> None:
        """Warn, once, where gradients are made private and the method uses data in another way."""
        observes = self._discard is not None  # who has something to discard has seen inputs
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        if observes and not self._warned and hasattr(first, "grad_sample"):  # set by Opacus
            self._warned = True
            warnings.warn(
                f"{self.key}: gradients per sample are clipped and made noisy (Opacus), but the statistics of the inputs, which "
                f"{self.key} uses and which its checkpoints hold, are not: the privacy guarantee does not cover them",
                stacklevel=4,
            )

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._after is not None and not self._skips:
            self._after(optimizer)

    def _save(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state if self._state is None else {**state, self.key: self._state.state_dict()}

    def _load(self, _: Optimizer, state: dict[str, Any]) -> None:
        if self._state is not None and self.key in state:
            self._state.load_state_dict(state[self.key])

    def _zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self._zero_grad_below(*args, **kwargs)
        if self.attached and self._discard is not None:
            self._discard(self.optimizer)


def _with_handles(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state that a copy of ``optimizer`` starts from, with what is attached to it."""
    return {**type(optimizer).__getstate__(optimizer), _HANDLES: vars(optimizer)[_HANDLES]}


def can_hook(optimizer: object) -> bool:
    """Return whether an optimizer has the hooks of a torch optimizer; some wrappers do not call its constructor."""
    return isinstance(optimizer, Optimizer) and all(name in vars(optimizer) for name in _HOOKS)


def attachments(optimizer: Optimizer) -> list[StepHandle]:
    """Return the handles of everything that is attached to ``optimizer``, in the order in which it was attached.

    An optimizer that Accelerate has wrapped has those of the one inside.
    """
    inner = vars(optimizer).get("optimizer")
    if _HANDLES not in vars(optimizer) and isinstance(inner, Optimizer):
        return attachments(inner)
    return list(vars(optimizer).get(_HANDLES, ()))


def check_attachable(optimizer: Optimizer, key: str) -> None:
    """Refuse an optimizer that :func:`attach_to_step` cannot serve.

    Args:
        optimizer: The optimizer, or whatever was given for one.
        key: Name of the method.

    Raises:
        ValueError: See :func:`attach_to_step`.
    """
    kind = type(optimizer).__name__
    inner = next((name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)), None)
    remedy = "use an optimizer that steps once per call (SGD, Adam, ...)"
    if inner is not None:
        remedy = f"attach to the optimizer inside it, optimizer.{inner}"
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{key} cannot be attached to LBFGS: it evaluates its closure several times per step, so there is no single "
            f"gradient to work on; {remedy}"
        )
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise ValueError(
            f"{key} cannot be attached to {kind}: it works on two gradients per step (first_step, second_step), and only the "
            f"second one moves the weights; {remedy}"
        )
    if not can_hook(optimizer):
        raise ValueError(f"{key} cannot be attached to {kind}: it lacks hooks that every torch optimizer has; {remedy}")


def attach_to_step(
    optimizer: Optimizer,
    key: str,
    prepare: Callback,
    *,
    after: Callback | None = None,
    discard: Callback | None = None,
    state: Stateful | None = None,
    on_remove: Callback | None = None,
    owner: Any = None,
) -> StepHandle:
    """Call ``prepare`` between backward and the optimizer's update, closures included.

    All callbacks get the optimizer: in a copy of the optimizer, the copied one. Nothing is attached if this raises.

    Args:
        optimizer: Any torch optimizer that works on one gradient per step.
        key: Name of the method: in messages, and of ``state`` in the optimizer's state dict.
        prepare: Called when all gradients of the step are there and before the update.
        after: Called after the update.
        discard: Called when ``optimizer.zero_grad()`` drops the gradients.
        state: What travels in the optimizer's state dict.
        on_remove: Called when the handle is removed.
        owner: What is attached. Its ``effects(model)``, if it has that, say how much of a model it reaches.

    Returns:
        A handle whose ``remove()`` takes everything off again.

    Raises:
        ValueError: The optimizer evaluates its closure several times per step (LBFGS), works on two gradients per step (SAM), or
            wraps another one without being a torch optimizer itself (Lookahead).
    """
    check_attachable(optimizer, key)
    return StepHandle(optimizer, key, prepare, after, discard, state, on_remove, owner)
