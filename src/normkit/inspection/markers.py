"""Mark this package's own modules and hooks, whatever file defines them."""

from typing import Any, TypeVar

_Hook = TypeVar("_Hook")


class Leaf:
    """A module of this package that a trace treats as one step; a mixin."""


def attachment(hook: _Hook) -> _Hook:
    """Mark a hook, or a class of hooks, as attached for training: a model to deploy loses it."""
    hook.normkit_attachment = True  # pyright: ignore[reportAttributeAccessIssue]
    return hook


def is_attachment(hook: Any) -> bool:
    """Return whether :func:`attachment` marked the hook (torch wraps the hooks of state dicts)."""
    return getattr(getattr(hook, "hook", hook), "normkit_attachment", False)
