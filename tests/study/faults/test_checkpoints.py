"""A checkpoint is of use to its own run alone, and nothing that is wrong with one costs a result or changes it."""

import dataclasses
import os
import shutil

import pytest
import torch

import normkit
from normkit.study.config import StudyConfig
from normkit.study.load import load
from normkit.study.store.fingerprint import fingerprint
from normkit.study.train import loop as loop_module
from normkit.study.train.checkpoint import CheckpointFile
from normkit.study.train.trial import run_trial
from tests.study.train.trials import key, without_time

MODEL = """
from torch import nn

def model(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, classes))
"""


class Killed(BaseException):
    """Stands for a kill: nothing in a trial catches it."""


def kill(_):
    raise Killed


@pytest.fixture(autouse=True)
def always_checkpoint(monkeypatch):
    monkeypatch.setattr(loop_module, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "own.py").write_text(MODEL)
    return StudyConfig(model=f"{tmp_path / 'own.py'}:model", methods=("batch",), batch_sizes=(16,), budget=64)


def train(config, folder, on_point=None):
    task = load(config)
    found = fingerprint(task, config.device)
    return without_time(run_trial(config, key(), task, folder=folder, fingerprint=found, on_point=on_point))


def interrupted(config, folder):
    """The checkpoint of a run that was killed at its second point."""
    seen = []
    with pytest.raises(Killed):
        train(config, folder, lambda point: kill(point) if seen else seen.append(point))
    (file,) = folder.glob("*.ckpt")
    return file


def test_a_run_whose_checkpoint_is_its_own_resumes(config, tmp_path):
    whole, points = train(config, None), []
    interrupted(config, tmp_path / "kept")
    assert train(config, tmp_path / "kept", lambda point: bool(points.append(point))) == whole
    assert len(points) < len(whole.curve)


@pytest.mark.parametrize(
    "edit", [("nn.ReLU", "nn.Tanh"), ("Dropout(0.1)", "Dropout(0.5)"), ("BatchNorm1d(8)", "Identity()")]
)
def test_an_edited_model_starts_anew(config, tmp_path, edit):
    interrupted(config, tmp_path / "kept")
    (tmp_path / "own.py").write_text(MODEL.replace(*edit))
    assert train(config, tmp_path / "kept") == train(config, None)


@pytest.mark.parametrize("other", [{"weight_decay": 1e-2}, {"budget": 80}, {"limit": 900}])
def test_the_checkpoint_of_another_study_under_this_one_s_name_counts_as_absent(config, tmp_path, other):
    mine = interrupted(config, tmp_path / "mine")
    theirs = interrupted(dataclasses.replace(config, **other), tmp_path / "theirs")
    shutil.copy(theirs, mine)
    assert train(config, tmp_path / "mine") == train(config, None)


def test_a_method_that_was_revised_starts_anew(config, tmp_path, monkeypatch):
    interrupted(config, tmp_path / "kept")
    revised = dict(normkit.recipes())
    revised["batch"] = dataclasses.replace(revised["batch"], revision=7)
    monkeypatch.setattr("normkit.recipes", lambda: revised)
    points = []
    again = train(config, tmp_path / "kept", lambda point: bool(points.append(point)))
    assert len(points) == len(again.curve)


def test_content_that_does_not_fit_the_run_starts_anew(config, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointFile, "load", lambda self: {"model": {"weight": torch.zeros(3)}})
    assert train(config, tmp_path) == train(config, None)


def test_a_file_that_is_no_archive_behind_a_right_digest_counts_as_absent(config, tmp_path):
    import hashlib

    file = interrupted(config, tmp_path / "kept")
    file.write_bytes(hashlib.sha256(b"words").digest() + b"words")
    assert train(config, tmp_path / "kept") == train(config, None)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["pipe", "folder", "loop"]
)
def test_what_is_no_file_counts_as_absent_and_costs_no_result(config, tmp_path, make):
    file = interrupted(config, tmp_path / "kept")
    file.unlink()
    make(file)
    assert train(config, tmp_path / "kept") == train(config, None)


@pytest.mark.filterwarnings("ignore")
def test_a_file_where_the_folder_should_be_costs_no_result(config, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert train(config, tmp_path / "file") == train(config, None)
    assert sum("no checkpoint" in message for message in caplog.messages) == 1


def test_a_checkpoint_that_cannot_be_removed_costs_no_result(config, tmp_path, monkeypatch):
    interrupted(config, tmp_path / "kept")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert train(config, tmp_path / "kept").state == "finished"
