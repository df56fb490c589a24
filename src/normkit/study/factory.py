"""Factories of the user: ``package.module:name`` or ``path/to/file.py:name``."""

import pkgutil
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from normkit._errors import closest
from normkit.study.errors import FactoryError


def is_factory(spec: str) -> bool:
    """Return whether ``spec`` has the form module:name or file.py:name.

    Examples:
        >>> is_factory("my.data:build"), is_factory("a b/data.py:build"), is_factory("cifar10"), is_factory("hf:vit")
        (True, True, False, True)
    """
    module, colon, name = spec.rpartition(":")
    return (
        bool(colon)
        and name.isidentifier()
        and (module.endswith(".py") or all(part.isidentifier() for part in module.split(".")))
    )


def load_factory(spec: str, argument: str, fits: Callable[[Any], bool] = callable) -> Any:
    """Import the callable that ``spec`` names; modules are looked for in the working directory too.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name``.
        argument: What the user set, for the error message (``data``, ``model``).
        fits: Whether an object can be what was meant.

    Returns:
        The object.

    Raises:
        FactoryError: There is no such module, file or name, its import fails, or the object does not fit.
    """
    module_name, _, name = spec.rpartition(":")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name)
    except (Exception, SystemExit) as error:
        raise FactoryError(
            f"{argument} {spec!r}: importing {module_name!r} failed ({type(error).__name__}: {error}); give "
            "package.module:factory importable from here, or path/to/file.py:factory"
        ) from error
    factory = getattr(module, name, None)
    if not fits(factory):
        names = sorted(n for n, value in vars(module).items() if fits(value) and not n.startswith("_"))
        example = closest(name, names) or ", ".join(names[:5]) or "none"
        kind = "callable" if fits is callable else "task"
        raise FactoryError(f"{argument} {spec!r}: {module_name!r} has no {kind} {name!r}; it has for example {example}")
    return factory


def _import(name: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(name)
    finally:
        if added:
            sys.path.remove(here)


def _load_file(path: Path) -> Any:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = module_from_spec(spec)
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)  # for the modules beside it, also those that it imports later
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up while it is being executed
    try:
        spec.loader.exec_module(module)
    finally:
        if before is not None:
            sys.modules[spec.name] = before
        else:
            del sys.modules[spec.name]
    return module
