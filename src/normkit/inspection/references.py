"""Find every reference to a module that a model reaches, so that a replaced layer is replaced everywhere.

Beside its registered children a model reaches layers through plain attributes, containers nested to any depth, dataclasses,
namespaces and other objects, modules that are not registered, partials, bound methods, closures and weak references.
"""

import copy
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


def exchange(root: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace the keys of ``replaced`` by its values wherever ``root`` reaches them; return the new root."""
    return _Walk(replaced, write=True).run(root)


def unwritable(root: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> set[nn.Module]:
    """Return the keys of ``replaced`` to which an object refers that cannot be written; nothing is changed."""
    walk = _Walk(replaced, write=False)
    walk.run(root)
    return walk.stuck


def reached(root: nn.Module, others: Iterable[nn.Module]) -> set[nn.Module]:
    """Return which of ``others`` ``root`` reaches, for example what a copy shares with its original through functions."""
    walk = _Walk({module: module for module in others}, write=False)
    walk.run(root)
    return set(walk.found)


def copy_detached(root: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy in which tensors of a graph, which torch does not copy, are detached.

    Old ``weight_norm``, ``spectral_norm`` and pruning leave such tensors on their layers, and so do models that keep what they
    computed last.

    Args:
        root: Any module.
        memo: As in ``copy.deepcopy``: copies by the ids of the originals.
    """
    walk = _Walk({}, write=False)
    walk.run(root)
    return copy.deepcopy(root, {**{id(t): t.detach().clone() for t in walk.computed}, **(memo or {})})


def snapshot(root: nn.Module) -> Callable[[], None]:
    """Save the content of every module, container and object that ``root`` reaches; the returned function restores it.

    The values of tensors are not remembered. What was not written to in between is not written to.
    """
    walk = _Walk({}, write=False)
    walk.run(root)
    memory = [(value, _content(value), list(_places(value))) for value in walk.seen.values()]

    def restore() -> None:
        for value, content, places in memory:
            if isinstance(value, nn.Module):
                vars(value).clear()
                vars(value).update(content)
            elif content is None:
                now = [item for item, _ in _places(value)]
                for (item, put), present in zip(places, now, strict=False):
                    if item is not present:
                        put(item)
            elif not _same(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list | deque) else value.update(content)

    return restore


def _content(value: Any) -> Any:
    """A shallow copy of a module's attributes or of a container, None of anything else."""
    if isinstance(value, nn.Module):
        return dict(vars(value))
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list | set | deque) else None


def _same(now: Any, before: Any) -> bool:
    pairs = [[*c.items()] if isinstance(c, dict) else [(None, entry) for entry in c] for c in (now, before)]
    return len(now) == len(before) and all(a is b and k == key for (k, a), (key, b) in zip(*pairs, strict=True))


class _Walk:
    """Visits what a module reaches.

    Args:
        replaced: Modules and what comes in their place. The walk does not enter the former.
        write: Whether mutable values are written to.
    """

    def __init__(self, replaced: Mapping[nn.Module, nn.Module], *, write: bool) -> None:
        self.replaced, self.write = replaced, write
        self.seen: dict[int, Any] = {}
        self.pending: list[Any] = []
        self.found: list[nn.Module] = []
        self.stuck: set[nn.Module] = set()
        self.computed: list[Tensor] = []  # by operations that are differentiated

    def run(self, root: nn.Module) -> nn.Module:
        """Visit all that ``root`` reaches; what stands in its own place."""
        root = self.visit(root)
        while self.pending:  # no recursion: chains of objects may be long
            for item, put in list(_places(self.pending.pop())):
                mark = len(self.found)
                new = self.visit(item)
                if new is item:
                    continue
                try:
                    put(new if self.write else item)
                except Exception:  # a container that may not be written to raises whatever it likes
                    self.stuck.update(self.found[mark:])
        return root

    def visit(self, value: Any) -> Any:
        """What stands in the place of ``value``; a mutable value itself, which is written to later."""
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                self.computed.append(value)
            return value
        if isinstance(value, _ATOMS) or id(value) in self.seen:
            return value
        if isinstance(value, nn.Module) and value in self.replaced:
            self.found.append(value)
            new = self.replaced[value]
            return new if new is value else self.visit(new)  # it has the hooks of the former
        if isinstance(value, tuple | frozenset):
            return self._rebuilt(value)
        if isinstance(value, types.MethodType):
            return self._method(value)
        if isinstance(value, weakref.ref):
            new = self.visit(referent := value())
            return value if new is referent else weakref.ref(new)
        if not _is_own(value):
            self.seen[id(value)] = value
            self.pending.append(value)
        return value

    def _rebuilt(self, value: Any) -> Any:
        mark = len(self.found)
        items = [self.visit(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if type(value) in (tuple, frozenset):
            return type(value)(items)
        if hasattr(value, "_make"):  # a named tuple
            return value._make(items)
        self.stuck.update(self.found[mark:])
        return value

    def _method(self, value: types.MethodType) -> Any:
        owner = value.__self__
        new = self.visit(owner)
        if new is owner:
            return value
        method = getattr(new, value.__name__, None)
        if method is None:
            self.stuck.add(owner)  # pyright: ignore[reportArgumentType]
            return value
        return method


def _is_own(value: Any) -> bool:
    """Whether ``value`` is an object of this package that is no module: such look after their references themselves."""
    return not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] == "normkit"


def _places(value: Any) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """Where a mutable value holds others.

    Yields:
        What is held, and the function that puts something else in its place.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield item, partial(value.__setitem__, key)
            yield key, partial(_rename, value, key)
    elif isinstance(value, list | deque):
        for index, item in enumerate(value):
            yield item, partial(value.__setitem__, index)
    elif isinstance(value, set):
        for item in value:
            yield item, partial(_swap_member, value, item)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # of a cell that is empty yet
                yield cell.cell_contents, partial(setattr, cell, "cell_contents")
        for name in ("__defaults__", "__kwdefaults__"):
            yield getattr(value, name), partial(setattr, value, name)
    elif isinstance(value, partial):
        for name in ("func", "args", "keywords"):
            yield getattr(value, name), partial(_set_partial, value, name)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for name, item in attributes.items():
            if name != "normkit_origin":  # it remembers what was replaced
                yield item, partial(attributes.__setitem__, name)
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(cls).get(name), types.MemberDescriptorType) and hasattr(value, name):
                yield getattr(value, name), partial(object.__setattr__, value, name)


def _rename(mapping: dict[Any, Any], key: Any, new: Any) -> None:
    items = [(new if k is key else k, item) for k, item in mapping.items()]
    mapping.clear()
    mapping.update(items)


def _swap_member(members: set[Any], old: Any, new: Any) -> None:
    members.discard(old)
    members.add(new)


def _set_partial(value: Any, name: str, new: Any) -> None:
    parts = {part: getattr(value, part) for part in ("func", "args", "keywords")} | {name: new}
    value.__setstate__((parts["func"], parts["args"], parts["keywords"], vars(value)))
