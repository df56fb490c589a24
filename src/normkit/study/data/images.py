"""Images of a Hugging Face hub name or a local folder, decoded once.

All images of a split become one contiguous uint8 array in a cache folder, memory-mapped from then on: a second start
decodes nothing, processes share the memory, and what does not fit into memory still works. The folder is
``NORMKIT_CACHE``, else ``normkit`` in the platform's cache folder; it can be deleted at any time.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normkit.study.data.class_folders import class_folders
from normkit.study.data.dataset import Data, Split, make_data
from normkit.study.data.decode import decode_split
from normkit.study.data.hub import cache_folder, class_numbers, columns, examples_of, load_source, roles_of
from normkit.study.data.sampling import stratified
from normkit.study.errors import DataError

_FORMAT = 1  # of the cache: a change makes old entries unused
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


def load_images(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    size: int | None = None,
    train_split: str = "train",
    limit: int | None = None,
) -> Data:
    """Image classification data as uint8 tensors; arguments as in ``normkit.study.data.load.load_data``.

    Returns:
        The data, its tensors memory-mapped from the cache.

    Raises:
        DataError: No such data, no network, corrupt files, missing columns or splits, images of different shapes.
    """
    if not name:
        raise DataError("data '' is no name; give one, for example digits, or a folder")

    def choose(dataset: Any) -> _Chosen:
        return _choose(name, dataset, image_column, label_column, train_split, limit)

    local, chosen, dataset = Path(name).expanduser(), None, None
    if local.is_dir() and (listed := class_folders(name, local)) is not None:
        chosen = choose(listed)
        fingerprint = _fingerprint(local, chosen.files(), chosen.class_names)
    elif local.exists():
        fingerprint = _fingerprint(local, sorted(p for p in local.rglob("*") if p.is_file()) or [local])
    else:
        dataset = load_source(name)
        fingerprint = "/".join(f"{split}:{part._fingerprint}" for split, part in sorted(dataset.items()))
    parts = [_FORMAT, fingerprint, image_column, label_column, size, limit]
    key = json.dumps(parts if train_split == "train" else [*parts, train_split])
    entry = cache_folder() / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    if not entry.is_dir():
        _decode(name, chosen or choose(dataset or load_source(name)), size, entry)
    return _open(name, entry)


@dataclass(frozen=True)
class _Chosen:
    """The samples that are used: role -> the name of its split, its rows and their class numbers."""

    splits: dict[str, tuple[str, Any, np.ndarray]]
    image_column: str
    class_names: list[str]
    classes: int
    notes: set[str]

    def files(self) -> list[Path]:
        """The files of images that are stored by their path."""
        from datasets import Image

        column = self.image_column
        parts = [part.cast_column(column, Image(decode=False)) for _, part, _ in self.splits.values()]
        return [Path(image["path"]) for part in parts for image in part[column]]


def _choose(
    name: str, dataset: Any, image_column: str | None, label_column: str | None, train_split: str, limit: int | None
) -> _Chosen:
    roles, notes = roles_of(name, dataset, train_split)
    examples = {role: examples_of(dataset, split) for role, split in roles.items()}
    image, label = columns(name, examples["train"], image_column, label_column)
    labels = {role: class_numbers(name, part, label) for role, part in examples.items()}
    values = labels["train"][1]
    classes = len(values) or 1 + max(int(numbers.max()) for numbers, _ in labels.values())
    splits = {}
    for role, split in roles.items():
        numbers, names = labels[role]
        if names != values:
            raise DataError(
                f"data {name!r}: {split} has classes {names[:5]} ..., train has {values[:5]} ...; make them alike"
            )
        part = examples[role]
        if limit is not None and limit < len(numbers):
            places = stratified(torch.from_numpy(numbers), limit, 0).numpy()
            numbers, part = numbers[places], part.select(places)
        splits[role] = split, part, numbers
    return _Chosen(splits, image, values, classes, notes)


def _fingerprint(path: Path, files: Iterable[Path], class_names: Sequence[str] = ()) -> str:
    """Changes when a class, or one of the files, is added, removed, resized or written again."""
    stats = ((os.fsencode(p.relative_to(path)), p.stat()) for p in files)
    lines = b"\n".join(b"%s %d %d" % (file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
    names = json.dumps(list(class_names)).encode() if class_names else b""
    return f"{path.resolve()} {hashlib.blake2b(lines + names).hexdigest()}"


def _decode(name: str, chosen: _Chosen, size: int | None, entry: Path) -> None:
    # Write one cache entry: ROLE.npy, ROLE_labels.npy and meta.json, renamed into place when complete.
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".part-"))
    except OSError as error:
        raise DataError(
            f"the cache folder {entry.parent} is not writable ({error}); set NORMKIT_CACHE to one that is"
        ) from error
    try:
        notes = set(chosen.notes)
        for role, (split, part, numbers) in chosen.splits.items():
            where = f"data {name!r}, split {split}"
            notes |= decode_split(where, part, chosen.image_column, size, work / f"{role}.npy")
            np.save(work / f"{role}_labels.npy", numbers)
        meta = {"notes": sorted(notes), "roles": list(chosen.splits), "classes": chosen.classes}
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            work.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another process was faster: its entry is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"data {name!r}: its cache {entry} is damaged ({error}); delete that folder and start again"
        ) from error
    for role, split in splits.items():
        if split.stored.shape[1:] != data.train.stored.shape[1:]:
            shapes = f"{_shape(split)}, those for training {_shape(data.train)} (channels x height x width)"
            raise DataError(
                f"data {name!r}: the {role} images are {shapes}; make them alike, their size with image_size"
            )
    return replace(data, classes=meta["classes"])


def _shape(split: Split) -> str:
    return "x".join(map(str, split.stored.shape[1:]))
