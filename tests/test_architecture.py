"""The architecture, read from the imports: floors, circles, the size of folders, and who knows which layer.

The floors stand in docs/architecture.md. An import counts wherever it is written: at the top, in a function, for types only.
"""

import ast
import re
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "normkit"
FLOORS = (  # from the bottom to the top
    {"moments", "_errors"},
    {"inspection"},
    {"optim"},
    {"instruments"},
    {"methods"},
    {"surgery"},
    {"functional", "_apply"},
    {"_public"},
    {"study"},
    {"integrations"},
    {"cli"},
    {"__main__"},
)
METHODS_SHARED = {"catalog", "kernels", "method"}  # what all methods have in common


def _module_name(path: Path) -> str:
    parts = ("normkit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class Import(NamedTuple):
    """One name that a file imports from the package; ``module`` is the module that it comes from."""

    module: str
    name: str | None
    local: str


@cache
def _imports(module: str) -> tuple[Import, ...]:
    """Return the imports of a module from the package, those inside functions and ``if TYPE_CHECKING`` included."""
    found = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] == "normkit"]
            found += [Import(alias.name, None, alias.asname or "normkit") for alias in ours]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "normkit":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                source, name = (inner, None) if inner in FILES else (node.module, alias.name)
                found.append(Import(str(source), name, alias.asname or alias.name))
    return tuple(found)


GRAPH = {module: {entry.module for entry in _imports(module)} for module in FILES}


def _room(module: str) -> str:
    return (*module.split("."), "")[1]


def _floor(module: str) -> int:
    return next((floor for floor, rooms in enumerate(FLOORS) if _room(module) in rooms), len(FLOORS))


def _method(module: str) -> str | None:
    """Return the method that a module belongs to: its file or folder in methods/."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "methods" and parts[2] not in METHODS_SHARED else None


def test_every_room_has_a_floor():
    rooms = {_room(module) for module in FILES} - {""}
    assert rooms == set().union(*FLOORS)


def test_no_import_is_relative():
    relative = [
        module
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_no_file_imports_from_a_floor_above():
    upwards = [f"{a} -> {b}" for a in FILES for b in sorted(GRAPH[a]) if _floor(b) > _floor(a) and b != "normkit"]
    assert upwards == []


def test_the_rooms_of_one_floor_do_not_import_each_other():
    sideways = [f"{a} -> {b}" for a in FILES for b in GRAPH[a] if _floor(a) == _floor(b) and _room(a) != _room(b)]
    assert sideways == []


def test_only_the_floors_above_the_public_face_use_it():
    study = _floor("normkit.study")
    assert [module for module in FILES if "normkit" in GRAPH[module] and _floor(module) < study] == []


def test_no_imports_run_in_a_circle():
    circle = []
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_no_method_imports_another():
    pairs = [(a, b) for a in FILES for b in sorted(GRAPH[a]) if _method(a) and _method(b) and _method(a) != _method(b)]
    assert [f"{a} -> {b}" for a, b in pairs] == []


def _checked_classes(module: str) -> list[str]:
    """Return the classes that a module checks by isinstance, issubclass, ``type(...) is`` or a class pattern."""
    classes: list[ast.expr] = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            classes.append(node.args[1])
        elif (
            isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and ast.unparse(node.left.func) == "type"
        ):
            classes += node.comparators
        elif isinstance(node, ast.MatchClass):
            classes.append(node.cls)
    return [
        ast.unparse(name) for expr in classes for name in ast.walk(expr) if isinstance(name, ast.Name | ast.Attribute)
    ]


def _is_our_layer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__.startswith("normkit.methods")


def test_only_methods_ask_whether_a_layer_is_one_of_ours():
    asked = []
    for module in FILES:
        if _room(module) == "methods":
            continue
        known = {
            e.local: getattr(import_module(e.module), e.name) for e in _imports(module) if e.name not in (None, "*")
        }
        known |= {e.local: import_module(e.module) for e in _imports(module) if not e.name and e.local != "normkit"}
        known["normkit"] = import_module("normkit")
        for text in _checked_classes(module):
            first, *rest = text.split(".")
            value = known.get(first)
            for name in rest:
                value = getattr(value, name, None)
            if _is_our_layer(value):
                asked.append(f"{module}: {text}")
    assert asked == []


def test_the_root_has_at_most_8_modules_and_8_folders():
    modules = list(PACKAGE.glob("*.py"))
    folders = [folder for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    assert len(modules) <= 8
    assert len(folders) <= 8


CODE_FOLDERS = [
    folder
    for base in ("src/normkit", "tests")
    for folder in sorted([ROOT / base, *(ROOT / base).rglob("*")])
    if folder.is_dir() and folder.name != "__pycache__"
]


@pytest.mark.parametrize("folder", CODE_FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_at_most_20_files(folder):
    assert len([path for path in folder.iterdir() if path.is_file()]) <= 20


@pytest.mark.parametrize("folder", CODE_FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_siblings_share_a_folder_and_not_a_prefix(folder):
    stems = [path.stem.removeprefix("test_") for path in folder.glob("*.py")]
    prefixes = Counter(match[0] for stem in stems if (match := re.match(r"[a-z0-9]+(?=_)", stem)))
    assert [prefix for prefix, count in prefixes.items() if count >= 3] == []
