"""Find, change and move the tensors in batches of any structure."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in tuples, lists, mappings and dataclasses, with its place.

    Args:
        value: A sample or a batch.
        path: Its own place.

    Yields:
        (place, value), where the value is none of these containers.

    Examples:
        >>> list(leaves(({"image": 1, "boxes": [2, 3]}, 4)))
        [("[0]['image']", 1), ("[0]['boxes'][0]", 2), ("[0]['boxes'][1]", 3), ('[1]', 4)]
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    else:
        yield path, value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a batch.

    Args:
        value: A batch.
    """
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A batch of the same structure, each tensor changed; anything else stays as it is.

    Args:
        change: What to do to each tensor.
        value: A batch.

    Examples:
        >>> map_tensors(lambda t: t + 1, {"x": [torch.tensor(1)], "name": "a"})
        {'x': [tensor(2)], 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(change, getattr(value, f.name)) for f in fields(value) if f.init})
    return value


def to_device(value: Any, device: torch.device | str) -> Any:
    """A batch on a device; an object that can move itself (``value.to``) does so.

    Args:
        value: A batch.
        device: Where to.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if callable(move := getattr(value, "to", None)):
        return move(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(to_device(item, device) for item in value)
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)
