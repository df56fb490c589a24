"""The task of a study: from ``--task``, or from ``--data`` and ``--model``; and the import path of a task in memory."""

import multiprocessing
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from normkit.study.classification import classification, load_classification
from normkit.study.config import DoctorConfig, LandscapeConfig, StudyConfig
from normkit.study.data.load import load_data
from normkit.study.data.sampling import seed_all
from normkit.study.errors import DataError, FactoryError, StudyError
from normkit.study.factory import is_factory, load_factory
from normkit.study.task import Task


def load(config: StudyConfig) -> Task:
    """Return the task of a study, with a validation split.

    Raises:
        DataError: The data cannot be used.
        StudyError: The task cannot be found, or leaves no sample to train or to validate on.
    """
    if config.task is None:
        return load_classification(config)
    return with_validation(load_task(config.task), config)


def load_unsplit(config: LandscapeConfig | DoctorConfig) -> Task:
    """Return the task without splitting off a validation split.

    Raises:
        StudyError: It cannot be used.
    """
    if config.task is not None:
        return load_task(config.task)
    try:
        return classification(load_data(config.data, limit=config.limit), config.model)
    except ValueError as error:
        raise StudyError(f"--data: {error}") from error


def with_validation(task: Task, config: StudyConfig) -> Task:
    """Return the task with the validation split of the study.

    Raises:
        StudyError: It leaves no sample to train or to validate on.
    """
    try:
        return task.with_validation(config.validation_amount)
    except DataError as error:
        raise StudyError(f"--validation {config.validation:g}: {error}") from error


_importing: ContextVar[bool] = ContextVar("importing", default=False)  # whether a task's file is being executed


def load_task(spec: str) -> Task:
    """Return the task at ``FILE.py:name`` or ``package.module:name``: a ``Task``, or a function that returns one.

    Raises:
        StudyError: There is none.
    """
    if not is_factory(spec):
        raise StudyError(
            f"--task {spec}: give FILE.py:name or package.module:name, a normkit.Task or a function that returns one"
        )
    seed_all(0)  # a task that draws its samples gives every process the same
    token = _importing.set(True)
    try:
        found = load_factory(spec, "--task", lambda value: isinstance(value, Task) or callable(value))
        return as_task(found, f"--task {spec}")
    except FactoryError as error:
        raise StudyError(str(error)) from error
    finally:
        _importing.reset(token)


def being_imported() -> bool:
    """Return whether a task's file is being executed, or a script by one of its own worker processes."""
    return _importing.get() or bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def as_task(value: Task | Callable[[], Any] | Any, where: str) -> Task:
    """Return the task itself, or the one that a function returns.

    Args:
        value: A task, or a function that returns one.
        where: What a message calls it.

    Raises:
        StudyError: It is neither, or the function raised.
    """
    if not isinstance(value, Task) and callable(value):
        try:
            value = value()
        except Exception as error:
            raise StudyError(f"{where}: the function raised {type(error).__name__}: {error}") from error
    if not isinstance(value, Task):
        raise StudyError(f"{where}: is a {type(value).__name__}; give a normkit.Task, or a function that returns one")
    return value


def import_path(value: Any) -> str | None:
    """Return the import path of a task, or of a function that makes it: ``FILE.py:name`` or ``package.module:name``.

    Args:
        value: The task or the function.

    Returns:
        The path; None for what is not a global name of a module or script, and in a notebook.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if not isinstance(names, dict) or (module.__name__.startswith("normkit.") and module.__name__ != "__main__"):
            continue
        name = next((name for name, held in list(names.items()) if held is value), None)
        if name is not None and name.isidentifier():
            return _place(module, name)
    return None


def _place(module: Any, name: str) -> str | None:
    if module.__name__ not in ("__main__", "__mp_main__"):
        return f"{module.__name__}:{name}"
    file = getattr(module, "__file__", None)
    return f"{Path(file).resolve()}:{name}" if file and file.endswith(".py") else None
