"""Data, models and checkpoints that nothing can be done with are refused in one line that names them; none is misread."""

import os

import numpy as np
import pytest
import torch

from normkit.cli.main import main
from normkit.study.data.load import load_data
from normkit.study.errors import DataError
from tests.study.data.test_load import encoded, own_caches, pictures, write_parquet  # noqa: F401

pytest.importorskip("datasets", reason="needs normkit[study]")

HEAD = """
import numpy as np
import torch
from torch import nn
x, y = torch.randn(60, 5), torch.arange(60) % 3

def split(x, y): return (x[:40], y[:40]), None, (x[40:], y[40:])
def model(shape, classes): return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))
"""
DATA = {
    "meta inputs": ("x.to('meta'), y", "inputs are a strided tensor of float32 on meta"),
    "meta labels": ("x, y.to('meta')", "labels are a strided tensor of int64 on meta"),
    "sparse": ("x.to_sparse(), y", "inputs are a sparse_coo tensor"),
    "complex": ("x.to(torch.complex64), y", "inputs are a strided tensor of complex64"),
    "objects": ("np.array([None] * 60, dtype=object)[:, None], y", "could not be read as (input, label) pairs"),
    "text labels": ("x, np.array(['cat', 'dog'] * 30)", "could not be read as (input, label) pairs"),
    "identifiers": ("x, y + 2**40", "labels go up to 1099511627778; number the classes 0, 1, 2"),
    "beyond memory": ("torch.zeros(()).double().expand(60, 2**46), y", "do not fit into memory"),
    "no columns": ("x[:, :0], y", "give inputs (N, ...)"),
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("form", ["pair", "splits"])
def test_tensors_that_are_no_data_are_refused(kind, form, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # error lines are shortened: a long path would leave no room for the reason
    expression, message = DATA[kind]
    whole = f"((({expression}),) * 3)" if form == "splits" else f"(({expression}), None, ({expression}))"
    (tmp_path / "own.py").write_text(f"{HEAD}\ndef data(): return {whole}\n")
    arguments = ["--methods", "batch", "--batch-sizes", "8", "--budget", "8", "--out", str(tmp_path / "out")]
    assert (
        main([
            "compare",
            "--data",
            "own.py:data",
            "--model",
            "own.py:model",
            *arguments,
        ])
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 300


@pytest.mark.parametrize("command", ["compare", "landscape", "doctor"])
def test_a_model_without_values_is_refused(command, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        f"{HEAD}\ndef data(): return split(x, y)\ndef meta(s, c): return model(s, c).to('meta')\n"
    )
    size = ["--batch-sizes", "8"] if command == "compare" else []
    assert (
        main([command, "--data", f"{tmp_path / 'own.py'}:data", "--model", f"{tmp_path / 'own.py'}:meta", *size]) == 2
    )
    assert "cannot be put on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "saved", [{1: torch.zeros(1)}, {"x": 5, ("a", 1): 2}, {"model": {None: 1}}, [1], torch.zeros(2)]
)
def test_a_checkpoint_with_odd_keys_is_refused(saved, tmp_path, capsys):
    torch.save(saved, tmp_path / "odd.pt")
    assert main(["doctor", "--checkpoint", str(tmp_path / "odd.pt")]) == 2
    assert "odd.pt: " in capsys.readouterr().err


def images(folder, classes=("ant", "bee", "cat"), count=6):
    for role in ("train", "test"):
        for number, name in enumerate(classes):
            place = folder / role / name
            place.mkdir(parents=True)
            for index, picture in enumerate(pictures(count, seed=number)):
                (place / f"{index}.png").write_bytes(encoded(picture))
    return folder


@pytest.mark.parametrize("name", ["a b", "{x}", "ä", "q%41", "a[b]", "what?", "st*r"])
def test_a_path_with_any_plain_name_is_read(name, tmp_path):
    data = load_data(str(images(tmp_path / name)))
    assert (data.classes, len(data.train), len(data.test)) == (3, 18, 18)


@pytest.mark.parametrize("name", ["a[b]", "what?", "st*r", os.fsdecode(b"b\xffd")])
def test_a_path_that_would_be_read_as_a_pattern_is_named(name, tmp_path):
    folder = images(tmp_path / name)
    (folder / "train" / "notes.txt").touch()  # so that it is not plain SPLIT/CLASS/FILE
    with pytest.raises(DataError, match=r"its path has .*; rename the folder"):
        load_data(str(folder))


def test_names_that_are_no_utf_8_are_named(tmp_path):
    with pytest.raises(DataError, match="its path has a byte that is no UTF-8, so"):
        load_data(str(images(tmp_path / os.fsdecode(b"b\xffd"))))


def linked(folder, place, elsewhere):
    """Move a part of a folder and leave a link to it."""
    (folder / place).rename(elsewhere)
    (folder / place).symlink_to(elsewhere, target_is_directory=elsewhere.is_dir())
    return folder


@pytest.mark.parametrize("place", ["train/cat", "test", "train/cat/0.png"])
def test_links_are_followed(place, tmp_path, monkeypatch):
    whole = load_data(str(images(tmp_path / "whole")))
    data = load_data(str(linked(images(tmp_path / "data"), place, tmp_path / "elsewhere")))
    for split, expected in ((data.train, whole.train), (data.test, whole.test)):
        assert torch.equal(split.inputs, expected.inputs)
        assert torch.equal(split.labels, expected.labels)


def test_images_behind_a_link_are_decoded_again_when_they_change(tmp_path):
    folder = linked(images(tmp_path / "data"), "train/cat", tmp_path / "elsewhere")
    assert len(load_data(str(folder)).train) == 18
    (tmp_path / "elsewhere" / "0.png").unlink()
    assert len(load_data(str(folder)).train) == 17


def test_a_link_to_its_own_parent_is_named(tmp_path):
    folder = images(tmp_path / "data")
    (folder / "train" / "cat" / "again").symlink_to(folder / "train", target_is_directory=True)
    with pytest.raises(
        DataError, match="again is a link to a folder, which is followed only where all files are images"
    ):
        load_data(str(folder))


def test_a_link_to_nothing_is_named_instead_of_dropped(tmp_path):
    (images(tmp_path / "data") / "train" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="gone is a link to nothing; mend or remove it"):
        load_data(str(tmp_path / "data"))


def test_a_folder_that_is_reached_through_a_link_is_read(tmp_path):
    (tmp_path / "link").symlink_to(images(tmp_path / "data"), target_is_directory=True)
    assert load_data(str(tmp_path / "link")).classes == 3


def test_images_below_the_folder_of_their_class_are_named(tmp_path):
    folder = images(tmp_path / "data")
    (folder / "train" / "cat" / "indoors").mkdir()
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "indoors" / "0.png")
    with pytest.raises(DataError, match="indoors holds images deeper than SPLIT/CLASS/"):
        load_data(str(folder))


def test_a_label_column_with_the_images_is_refused(tmp_path):
    for role in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{role}-0.parquet", map(encoded, pictures(6)), np.arange(6) % 3)
    with pytest.raises(
        DataError, match=r"label_column 'img' .* holds Image values; choose the column with the classes"
    ):
        load_data(str(tmp_path / "data"), label_column="img")
