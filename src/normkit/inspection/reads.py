"""Find layers whose tensors are read without calling the layer: tied decoders, penalties, fused paths.

Such a layer cannot be replaced, and its weights cannot be rescaled, as if it were only called. The data flow tells where a
model traces. Where it does not, the source of its forward passes is read.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from normkit.inspection.graph import Dataflow, is_leaf
from normkit.inspection.norms import PRODUCERS, is_frozen_norm, is_norm

_TENSORS = {"weight", "bias", "running_mean", "running_var"}
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad"}
_ALL = {"parameters", "named_parameters", "state_dict", "get_parameter"}


def tensors_read(model: nn.Module, flow: Dataflow) -> dict[nn.Module, str]:
    """Return the layers whose weights or statistics the model uses as tensors, or may use, each with the user.

    Args:
        model: Any module.
        flow: Its data flow.

    Examples:
        >>> from normkit.inspection.graph import dataflow
        >>> tensors_read(net := nn.Sequential(nn.Linear(2, 3), nn.ReLU()), dataflow(net))
        {}
    """
    readers: dict[nn.Module, str] = {}
    held: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            held.setdefault(id(tensor), []).append(module)
    for index, step in enumerate(flow.steps):
        if step.name == "attribute" and step.path is not None and flow.consumers(index):
            owner, _, name = step.path.rpartition(".")
            tensor = getattr(model.get_submodule(owner), name, None)
            for layer in held.get(id(tensor), ()):
                readers.setdefault(layer, f"the model uses its {name} as a tensor")
    for path in flow.opaque:
        module = model.get_submodule(path)
        kind = f"{path} ({type(module).__name__})" if path else type(module).__name__
        for chain in attribute_chains(module):
            for layer in _read(module, chain, _TENSORS | _ALL):
                readers.setdefault(layer, f"{kind} cannot be traced, and its source reads {'.'.join(chain)}")
    return readers


def attributes_read(model: nn.Module) -> dict[nn.Module, str]:
    """Return the normalization layers whose attributes another module reads by name in its forward, with that module.

    A layer that takes their place is not called there, or lacks the attribute: torch's fast path of transformer encoders,
    layers fused for quantization.
    """
    readers: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        kind = f"{path} ({type(module).__name__})" if path else type(module).__name__
        if is_norm(module) or (is_leaf(module) and not any(True for _ in module.children())):
            continue
        for chain in attribute_chains(module):
            if len(chain) < 3 or chain[-1] == "training":
                continue
            for layer in _named(module, chain[:-1]):
                if is_norm(layer) and chain[-1] in vars(layer) | layer._parameters | layer._buffers:
                    readers.setdefault(layer, f"{kind} reads its {chain[-1]} instead of calling it")
    return readers


def _read(module: nn.Module, chain: tuple[str, ...], names: set[str]) -> list[nn.Module]:
    """The linear, convolution and normalization layers whose tensors ``chain`` reads."""
    if chain[-1] not in names:
        return []
    owners = _named(module, chain[:-1])
    if len(chain) == 2 and chain[0] != "self":  # a local variable: any layer
        owners = list(module.modules())
    elif chain[-1] in _ALL:
        owners = [part for owner in owners for part in owner.modules()]
    return [layer for layer in owners if _is_layer(layer)]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, PRODUCERS) or is_norm(module) or is_frozen_norm(module)


def _named(module: nn.Module, chain: tuple[str, ...]) -> list[nn.Module]:
    """The modules that ``chain`` names: exactly where it starts at ``self``, by the last name below ``module`` otherwise."""
    if chain[0] == "self":
        found: Any = module
        for name in chain[1:]:
            found = getattr(found, name, None)
        return [found] if isinstance(found, nn.Module) else []
    return [part for path, part in module.named_modules() if path.rpartition(".")[2] == chain[-1]]


def attribute_chains(module: nn.Module) -> frozenset[tuple[str, ...]]:
    """Return what a module's forward, and the methods it calls, read: ``("self", "norm", "weight")`` for ``self.norm.weight``.

    The beginnings of a chain are among them. Reads of shapes, dtypes and devices are left out, and so are branches that a setting
    of the module excludes: ``if self.merged``. A base that is no name is ``"?"``.
    """
    chains: set[tuple[str, ...]] = set()
    todo, done = ["forward"], set[str]()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        tree = _source(type(module), name)
        for chain in () if tree is None else _chains(tree, module):
            chains.add(chain)
            if chain[0] == "self" and len(chain) == 2:
                todo.append(chain[1])
    return frozenset(chains)


@cache
def _source(cls: type[nn.Module], name: str) -> ast.AST | None:
    """The source of a method, where it has one and is not ``nn.Module``'s."""
    method = inspect.getattr_static(cls, name, None)
    if not inspect.isfunction(method) or method.__qualname__.startswith("Module."):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None


def _chains(tree: ast.AST, module: nn.Module) -> Iterator[tuple[str, ...]]:
    for node in _reachable(tree, module):
        if not isinstance(node, ast.Attribute):
            yield from _chains(node, module)
            continue
        names, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            names.append(base.attr)
            base = base.value
        if not isinstance(base, ast.Name):
            yield from _chains(base, module)
        chain = (base.id if isinstance(base, ast.Name) else "?", *reversed(names))
        called = isinstance(tree, ast.Call) and node is tree.func
        for end in range(2, len(chain) + 1):
            last = end == len(chain)
            if chain[end - 1] in _ALL and not (last and called):
                continue  # not the method of a module: inspect.signature(f).parameters
            if chain[end - 1] not in _METADATA and (last or chain[end] not in _METADATA):
                yield chain[:end]


def _reachable(tree: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """Go through the children of a node, without the branches of an ``if`` that a setting of the module excludes.

    Yields:
        The children.
    """
    if not isinstance(tree, ast.If):
        yield from ast.iter_child_nodes(tree)
        return
    value = _setting(tree.test, module)
    yield tree.test
    if value is not False:
        yield from tree.body
    if value is not True:
        yield from tree.orelse


def _setting(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on the settings of a module is, or None where it depends on anything else."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _setting(test.operand, module)
        return None if value is None else not value
    if isinstance(test, ast.BoolOp):
        decides = isinstance(test.op, ast.Or)  # one that is enough
        values = [_setting(part, module) for part in test.values]
        if decides in values:
            return decides
        return None if None in values else not decides
    if isinstance(test, ast.Attribute) and isinstance(test.value, ast.Name) and test.value.id == "self":
        value = getattr(module, test.attr, module)
        plain = value is None or isinstance(value, bool | int | str)
        return bool(value) if plain and test.attr != "training" else None
    return None
