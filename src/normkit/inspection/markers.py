"""Marks by which this package knows its own modules and hooks; a file may move without changing what they are."""

from typing import Any, TypeVar

_Hook = TypeVar("_Hook")


class Leaf:
    """A module of this package that a trace takes as one step; a mixin."""


def attachment(hook: _Hook) -> _Hook:
    """Mark a hook, or a class of hooks, as attached by this package for training: a model to deploy is left without it."""
    hook.normkit_attachment = True  # pyright: ignore[reportAttributeAccessIssue]
    return hook


def is_attachment(hook: Any) -> bool:
    """Whether :func:`attachment` marked the hook (torch wraps the hooks of state dicts)."""
    return getattr(getattr(hook, "hook", hook), "normkit_attachment", False)
