"""Folders of images are listed as datasets reads them, and with a limit no other file is looked at."""

import os
from pathlib import Path

import pytest

from normkit.study.data.class_folders import class_folders
from normkit.study.data.images import _choose
from normkit.study.data.load import load_data
from tests.study.data.test_load import encoded, own_caches, pictures  # noqa: F401

datasets = pytest.importorskip("datasets", reason="needs normkit[study]")


def folder_of(root, classes=("a", "a b", "B", "ä"), names=("10.png", "9.PNG", "é.png", ".hidden.png")):
    for split, number in (("train", 0), ("test", 1), ("val", 2)):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for name, picture in zip(names, pictures(len(names), seed=number), strict=True):
                (root / split / label / name).write_bytes(encoded(picture))
    return root


def columns_of(part):
    paths = [
        os.path.realpath(image["path"]) for image in part.cast_column("image", datasets.Image(decode=False))["image"]
    ]
    return paths, part["label"][:], part.features


def test_the_rows_and_classes_are_those_of_datasets(tmp_path):
    listed = class_folders("x", folder_of(tmp_path / "data"))
    read = datasets.load_dataset(str(tmp_path / "data"))
    assert {"train", "test"} < set(listed) <= {*read, "val"}
    for split, name in (("train", "train"), ("test", "test"), ("val", "validation")):
        assert columns_of(listed[split]) == columns_of(read[name])


@pytest.mark.parametrize(
    "extra",
    ["notes.txt", "train/metadata.csv", "train/a/labels.csv", "train/0.png", "train/a/b/0.png", "extra/a/0.png"],
)
def test_a_folder_with_anything_else_is_left_to_datasets(extra, tmp_path):
    file = folder_of(tmp_path / "data") / extra
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert class_folders("x", tmp_path / "data") is None


def test_one_class_is_left_to_datasets(tmp_path):
    assert class_folders("x", folder_of(tmp_path / "data", classes=("a",))) is None


def test_a_limit_looks_at_no_other_file(tmp_path, monkeypatch):
    folder_of(tmp_path / "data")
    looked_at, stat, read = set(), Path.stat, Path.read_bytes
    monkeypatch.setattr(Path, "stat", lambda self, **how: (looked_at.add(self), stat(self, **how))[1])
    monkeypatch.setattr(Path, "read_bytes", lambda self: (looked_at.add(self), read(self))[1])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("all was read"))
    data = load_data(str(tmp_path / "data"), limit=4)
    assert (len(data.train), len(data.test), len(data.validation), data.classes) == (4, 4, 4, 4)
    assert sum(file.suffix.lower() == ".png" for file in looked_at) == 3 * 4


def test_a_change_of_what_is_not_used_decodes_nothing_again(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "data")
    used = load_data(str(folder), limit=4).train.inputs.clone()
    chosen = _choose("x", class_folders("x", folder), None, None, "train", 4).files()
    spare = next(file for file in folder.rglob("*9.PNG") if file not in chosen)
    spare.write_bytes(spare.read_bytes() + b" ")
    monkeypatch.setattr("normkit.study.data.images._decode", lambda *_: pytest.fail("decoded again"))
    assert (load_data(str(folder), limit=4).train.inputs == used).all()


def test_a_class_that_is_added_decodes_again(tmp_path):
    folder = folder_of(tmp_path / "data", names=("9.png",))
    assert load_data(str(folder), limit=2).classes == 4
    for split in ("train", "test", "val"):
        (folder / split / "zebra").mkdir()
        (folder / split / "zebra" / "9.png").write_bytes(encoded(pictures(1)[0]))
    assert load_data(str(folder), limit=2).classes == 5
