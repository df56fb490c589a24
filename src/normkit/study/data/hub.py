"""Image sources: the hub or a local folder, through Hugging Face datasets, with their splits and columns."""

import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np

from normkit.study.errors import DataError

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VALIDATION = ("validation", "valid", "val", "dev")


def cache_folder() -> Path:
    """Return the folder of decoded images."""
    if "NORMKIT_CACHE" in os.environ:
        return Path(os.environ["NORMKIT_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "normkit"


def hugging_face_datasets(name: str) -> Any:
    """The package ``datasets``.

    Args:
        name: What the user called the data that needs it.

    Raises:
        DataError: It is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data {name!r} needs Hugging Face datasets; install normkit[study]") from error
    return datasets


def load_source(name: str) -> Any:
    """The data set with all its splits, nothing decoded.

    Raises:
        DataError: There is none, or it cannot be reached or read.
    """
    datasets = hugging_face_datasets(name)
    local = Path(name).expanduser()
    if local.is_file():
        raise DataError(
            f"data {name!r} is one file, which has no test split; give a folder with train.parquet and test.parquet, or with "
            "images in train/CLASS/ and test/CLASS/"
        )
    try:
        if local.is_dir():
            check_tree(name, local)
            return datasets.load_dataset(str(local.resolve()))
        repository, _, configuration = name.partition("@")
        with _quick_offline():
            return datasets.load_dataset(repository, configuration or None)
    except DataError:
        raise
    except Exception as error:
        raise DataError(_load_failed(name, error, local.exists())) from error


def check_tree(name: str, folder: Path) -> None:
    """Refuse folders that would be read differently from what their layout suggests.

    Those are links to nothing, or to folders (which are followed in SPLIT/CLASS/FILE alone), images below the folder of their
    class, and a path whose characters stand for others or are no UTF-8: ``datasets`` takes it for a pattern.

    Args:
        name: What the user called the data.
        folder: A folder that is not plain SPLIT/CLASS/FILE.

    Raises:
        DataError: There is such a link, image or path.
    """
    path = str(folder.resolve())
    odd = (
        sorted(set("[]?*") & set(path)) or ["a byte that is no UTF-8"][: path != path.encode(errors="replace").decode()]
    )
    if odd:
        raise DataError(f"data {name!r}: its path has {odd[0]}, so it would be read as a pattern; rename the folder")
    for here, folders, files in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        for child in folders:
            if os.path.islink(os.path.join(here, child)):
                raise DataError(
                    f"data {name!r}: {os.path.join(here, child)} is a link to a folder, which is followed only where all "
                    "files are images in SPLIT/CLASS/; copy or mount the folder there"
                )
        for file in files:
            if not os.path.exists(os.path.join(here, file)):
                raise DataError(f"data {name!r}: {os.path.join(here, file)} is a link to nothing; mend or remove it")
        if depth > 2 and any(Path(file).suffix.lower() in IMAGES for file in files):
            raise DataError(
                f"data {name!r}: {here} holds images deeper than SPLIT/CLASS/, so their class is not clear; move them up"
            )


def _load_failed(name: str, error: Exception, local: bool) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    cause = error.__cause__ or error.__context__
    if cause is not None and type(error).__name__ == "DatasetGenerationError":
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    if local:
        remedy = "it must hold parquet files or images in train/CLASS/ and test/CLASS/; fetch damaged files again"
    elif "Config name is missing" in str(error):
        remedy = f"choose one as {name}@CONFIGURATION"
    else:
        remedy = (
            "no such folder here; a name of the Hugging Face hub needs a network connection once (or HF_ENDPOINT), "
            "or give the path of a local copy"
        )
    return f"data {name!r} could not be loaded ({reason}); {remedy}"


@contextmanager
def _quick_offline() -> Generator[None, None, None]:
    """Without a connection to the hub, use what is cached or fail at once instead of retrying for half a minute."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not before[0] and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Return whether a name can be resolved and connected to, or a proxy is set (which is then trusted)."""
    url = urlsplit(endpoint)
    if url.scheme in getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError:
        return False
    return True


def examples_of(dataset: Any, split: str) -> Any:
    """The examples of a split, or of several whose names are joined by +, one after the other."""
    from datasets import concatenate_datasets

    parts = [dataset[part] for part in split.split("+")]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def roles_of(name: str, dataset: Any, train: str = "train") -> tuple[dict[str, str], set[str]]:
    """Return which split trains, validates and tests, and a note for the report.

    A test split without labels (-1) is no test split.

    Args:
        name: What the user called the data.
        dataset: All its splits.
        train: The split that trains, or several joined by +.

    Raises:
        DataError: There is none to train or to test on.
    """
    splits = list(dataset)
    if missing := [part for part in train.split("+") if part not in splits]:
        remedy = "name one split 'train'" if train == "train" else "change train_split"
        raise DataError(f"data {name!r} has no {missing[0]} split (it has {', '.join(splits)}); {remedy}")
    told = set() if train == "train" else {f"trained on its splits {train}"}
    validation = next((s for s in VALIDATION if s in splits), None)
    if "test" in splits and not _unlabelled(dataset["test"]):
        return {"train": train, "test": "test"} | ({"validation": validation} if validation else {}), told
    if validation is None:
        raise DataError(
            f"data {name!r} has no labelled test split (it has {', '.join(splits)}); add one (files under test/, or a "
            "factory, package.module:factory, that splits the data)"
        )
    return {"train": train, "test": validation}, {*told, f"its {validation} split serves as test split"}


def _unlabelled(split: Any) -> bool:
    from datasets import ClassLabel

    labels = [column for column, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if not labels or len(split) == 0:
        return False
    first = split.select_columns(labels)[0]
    return any(first[column] in (None, -1) for column in labels)


def columns(name: str, split: Any, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The columns with images and with classes: those given, else the only ones of their types.

    Raises:
        DataError: There is no such column, or more than one.
    """
    from datasets import ClassLabel, Image

    def find(given: str | None, kind: type, argument: str, what: str) -> str:
        have = ", ".join(split.column_names)
        if given is not None:
            if given not in split.column_names:
                raise DataError(f"{argument} {given!r} is no column of data {name!r}; it has {have}")
            return given
        found = [column for column, feature in split.features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            raise DataError(
                f"data {name!r} has {'several columns' if found else 'no column'} of {what} "
                f"({', '.join(found) or 'columns: ' + have}); choose one with {argument}"
            )
        return found[0]

    image = find(image_column, Image, "image_column", "images")
    if not isinstance(split.features[image], Image):
        raise DataError(
            f"image_column {image!r} of data {name!r} holds {split.features[image]}, not images; choose another"
        )
    return image, find(label_column, ClassLabel, "label_column", "classes")


def class_numbers(name: str, split: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """Class numbers, and the class names where there are some; text is numbered in alphabetical order.

    Raises:
        DataError: The column is missing, or holds something else.
    """
    from datasets import ClassLabel, Value

    if column not in split.column_names:
        raise DataError(
            f"label_column {column!r} is missing in a split of data {name!r}; it has {', '.join(split.column_names)}"
        )
    feature = split.features[column]
    if not isinstance(feature, ClassLabel | Value):
        raise DataError(
            f"label_column {column!r} of data {name!r} holds {type(feature).__name__} values; choose the column with the classes"
        )
    raw = split.with_format(None)[column][:]
    if any(value is None for value in raw):
        raise DataError(f"label_column {column!r} of data {name!r} has missing values; remove those rows")
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif isinstance(raw[0], str):
        names = sorted(set(raw))
        raw = np.unique(np.array(raw), return_inverse=True)[1]
    else:
        names = []
    numbers = np.asarray(raw)
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0:
        raise DataError(
            f"label_column {column!r} of data {name!r} holds {feature}; it must be class numbers from 0, or text"
        )
    return numbers.astype(np.int64), names
