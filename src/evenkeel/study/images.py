"""Images of a Hugging Face hub name, a local folder or parquet files, decoded once.

All images of a split become one contiguous uint8 array in a cache folder, memory-mapped from then on: a second start
decodes nothing, processes share the memory, and what does not fit into memory still works. The folder is
``EVENKEEL_CACHE``, else ``evenkeel`` in the platform's cache folder; it can be deleted at any time.
"""

import hashlib
import io
import json
import mmap
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch

from evenkeel.study.batches import stratified
from evenkeel.study.data import Data, DataError, Split, make_data

_FORMAT = 1  # of the cache: a change makes old entries unused
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on
_VALIDATION = ("validation", "valid", "val", "dev")


def cache_folder() -> Path:
    """Where decoded images are kept."""
    if "EVENKEEL_CACHE" in os.environ:
        return Path(os.environ["EVENKEEL_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "evenkeel"


def load_images(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    size: int | None = None,
    limit: int | None = None,
) -> Data:
    """Image classification data as uint8 tensors; arguments as in :func:`evenkeel.study.data.load_data`.

    Returns:
        The data, its tensors memory-mapped from the cache.

    Raises:
        DataError: No such data, no network, corrupt files, missing columns or splits, images of different sizes.
    """
    local = Path(name).expanduser()
    dataset = None
    if local.exists():
        fingerprint = _fingerprint(local)
    else:
        dataset = _load(name)
        fingerprint = "/".join(f"{split}:{part._fingerprint}" for split, part in sorted(dataset.items()))
    key = json.dumps([_FORMAT, fingerprint, image_column, label_column, size, limit])
    entry = cache_folder() / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    if not entry.is_dir():
        _decode(name, dataset if dataset is not None else _load(name), image_column, label_column, size, limit, entry)
    return _open(name, entry)


def _fingerprint(path: Path) -> str:
    """Changes when a file of the folder is added, removed, resized or written again."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = ((str(p.relative_to(path)), p.stat()) for p in files)
    lines = "\n".join(f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)
    return f"{path.resolve()} {hashlib.blake2b(lines.encode()).hexdigest()}"


def _load(name: str) -> Any:
    # The data set with all its splits, nothing decoded.
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data {name!r} needs Hugging Face datasets; install evenkeel[study]") from error
    local = Path(name).expanduser()
    if local.is_file() and local.suffix != ".parquet":
        raise DataError(f"data {name!r}: only .parquet files are read; give a folder for anything else")
    try:
        if local.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(local)})
        if local.is_dir():
            return datasets.load_dataset(str(local.resolve()))
        repository, _, configuration = name.partition("@")
        with _quick_offline():
            return datasets.load_dataset(repository, configuration or None)
    except Exception as error:
        raise DataError(_load_failed(name, error, local.exists())) from error


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
    """Whether a name can be resolved and connected to, or a proxy is set (which is then trusted)."""
    url = urlsplit(endpoint)
    if url.scheme in getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError:
        return False
    return True


def _decode(
    name: str,
    dataset: Any,
    image_column: str | None,
    label_column: str | None,
    size: int | None,
    limit: int | None,
    entry: Path,
) -> None:
    # Write one cache entry: ROLE.npy, ROLE_labels.npy and meta.json, renamed into place when complete.
    roles, notes = _roles(name, dataset)
    first = dataset[roles["train"]]
    image, label = _columns(name, first, image_column, label_column)
    labels = {role: _labels(name, dataset[split], label) for role, split in roles.items()}
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".part-"))
    except OSError as error:
        raise DataError(
            f"the cache folder {entry.parent} is not writable ({error}); set EVENKEEL_CACHE to one that is"
        ) from error
    try:
        values = labels["train"][1]
        for role, split in roles.items():
            numbers, names = labels[role]
            if names != values:
                raise DataError(
                    f"data {name!r}: {split} has classes {names[:5]} ..., train has {values[:5]} ...; make them alike"
                )
            part = dataset[split]
            if limit is not None and limit < len(numbers):
                chosen = stratified(torch.from_numpy(numbers), limit, 0).numpy()
                numbers, part = numbers[chosen], part.select(chosen)
            notes |= _decode_split(f"data {name!r}, split {split}", part, image, size, work / f"{role}.npy")
            np.save(work / f"{role}_labels.npy", numbers)
        classes = len(values) or 1 + max(int(numbers.max()) for numbers, _ in labels.values())
        (work / "meta.json").write_text(json.dumps({"notes": sorted(notes), "roles": list(roles), "classes": classes}))
        try:
            work.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster: its entry is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _roles(name: str, dataset: Any) -> tuple[dict[str, str], set[str]]:
    # Which split trains, validates and tests. A test split without labels (-1) is no test split.
    splits = list(dataset)
    if "train" not in splits:
        raise DataError(f"data {name!r} has no train split (it has {', '.join(splits)}); name one split 'train'")
    validation = next((s for s in _VALIDATION if s in splits), None)
    if "test" in splits and not _unlabelled(dataset["test"]):
        return {"train": "train", "test": "test"} | ({"validation": validation} if validation else {}), set()
    if validation is None:
        raise DataError(
            f"data {name!r} has no labelled test split (it has {', '.join(splits)}); add one (files under test/, or a "
            "factory, package.module:factory, that splits the data)"
        )
    return {"train": "train", "test": validation}, {f"its {validation} split serves as test split"}


def _unlabelled(split: Any) -> bool:
    from datasets import ClassLabel

    labels = [column for column, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if not labels or len(split) == 0:
        return False
    first = split.select_columns(labels)[0]
    return any(first[column] in (None, -1) for column in labels)


def _columns(name: str, split: Any, image_column: str | None, label_column: str | None) -> tuple[str, str]:
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


def _labels(name: str, split: Any, column: str) -> tuple[np.ndarray, list[str]]:
    # Class numbers, and the class names where there are some; text is numbered in alphabetical order.
    from datasets import ClassLabel

    if column not in split.column_names:
        raise DataError(
            f"label_column {column!r} is missing in a split of data {name!r}; it has {', '.join(split.column_names)}"
        )
    raw = split.with_format(None)[column][:]
    if any(value is None for value in raw):
        raise DataError(f"label_column {column!r} of data {name!r} has missing values; remove those rows")
    feature = split.features[column]
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


def _decode_split(where: str, split: Any, column: str, size: int | None, target: Path) -> set[str]:
    from datasets import Image

    raw = split.select_columns([column]).cast_column(column, Image(decode=False)).with_format(None)
    if len(raw) == 0:
        raise DataError(f"{where}: no examples; give some")
    sample = range(0, len(raw), max(1, len(raw) // 64))
    opened = [_picture(where, i, raw[i][column]) for i in sample]
    mode = "L" if all(picture.mode in {"1", "L"} for picture in opened) else "RGB"
    qualities = {q for picture in opened if (q := _jpeg_quality(picture)) is not None}

    def pixels(item: tuple[int, Any]) -> np.ndarray:
        index, row = item
        picture = _picture(where, index, row[column])
        try:
            picture = picture.convert(mode)
        except Exception as error:
            raise DataError(f"{where}: image {index} is damaged ({error}); fetch or remove it") from error
        return np.asarray(picture if size is None else _fit(picture, size), dtype=np.uint8)

    shape = pixels((0, raw[0])).shape
    array: Any = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(raw), 1024):
            rows = list(enumerate(raw.select(range(start, min(start + 1024, len(raw)))), start))
            for (index, _), image in zip(rows, pool.map(pixels, rows), strict=True):
                if image.shape != shape:
                    raise DataError(
                        f"{where}: image {index} is {image.shape[1]}x{image.shape[0]}, the first is "
                        f"{shape[1]}x{shape[0]}; bring them to one size with image_size"
                    )
                if array is None:
                    channels = 1 if mode == "L" else 3
                    array = np.lib.format.open_memmap(target, "w+", np.uint8, (len(raw), channels, *shape[:2]))
                array[index] = image if mode == "L" else image.transpose(2, 0, 1)
    array.flush()
    if not qualities:
        return set()
    return {
        f"images are stored as lossy JPEG (quality about {min(qualities)}): compare methods with one another, not with "
        "published accuracies on lossless images"
    }


def _picture(where: str, index: int, value: Any) -> Any:
    # An opened picture, its pixels not yet decoded.
    from PIL import Image

    try:
        source = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        return Image.open(io.BytesIO(source))
    except Exception as error:
        raise DataError(
            f"{where}: image {index} cannot be read ({type(error).__name__}: {error}); fetch or remove it"
        ) from error


def _fit(picture: Any, size: int) -> Any:
    """Shorter side resized to ``size``, centre cut out."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height)).crop((left, top, left + size, top + size))


def _jpeg_quality(picture: Any) -> int | None:
    """Quality of a JPEG by the usual scaling of its luminance table, whose entries sum to 3688 at quality 50."""
    tables: dict[int, Sequence[int]] | None = getattr(picture, "quantization", None)
    if picture.format != "JPEG" or not tables:
        return None
    scale = 100 * sum(tables[min(tables)]) / 3688
    return round((200 - scale) / 2 if scale <= 100 else 5000 / scale)


def _mapped(file: Path) -> np.ndarray:
    """The array of a ``.npy`` file, read when it is used.

    Mapped copy on write, since torch wants to be able to write, and on Linux without reserving memory for such copies: else
    the system refuses to map what is larger than its memory, as ``numpy.load`` would.
    """
    with file.open("rb") as source:
        np.lib.format.read_magic(source)
        shape, _, dtype = np.lib.format.read_array_header_1_0(source)
        if sys.platform == "linux":
            flags, rights = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(source.fileno(), 0, flags=flags, prot=rights)
        else:
            mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
        return np.ndarray(shape, dtype, mapped, source.tell())


def _open(name: str, entry: Path) -> Data:
    try:
        meta = json.loads((entry / "meta.json").read_text())
        splits = {
            role: Split(
                torch.from_numpy(_mapped(entry / f"{role}.npy")),
                torch.from_numpy(np.load(entry / f"{role}_labels.npy")),
            )
            for role in meta["roles"]
        }
        note, validation = "; ".join(meta["notes"]), splits.get("validation")
        data = make_data(name, splits["train"], splits["test"], validation=validation, note=note)
        return replace(data, classes=meta["classes"])
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"data {name!r}: its cache {entry} is damaged ({error}); delete that folder and start again"
        ) from error
