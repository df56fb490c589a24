import errno
import os

import pytest
import torch

from normkit.study.train.checkpoint import CheckpointFile


@pytest.fixture
def file(tmp_path):
    return CheckpointFile(tmp_path / "checkpoints", "trial")


def test_what_is_saved_comes_back(file):
    state = {"tensor": torch.arange(5.0, dtype=torch.float64), "step": 3, "nested": {"list": [1, 2.5, None]}}
    file.save(state)
    loaded = file.load()
    assert torch.equal(loaded["tensor"], state["tensor"])
    assert {k: v for k, v in loaded.items() if k != "tensor"} == {k: v for k, v in state.items() if k != "tensor"}


def test_without_a_checkpoint_there_is_none(file):
    assert file.load() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove", "garbage"])
def test_a_damaged_checkpoint_counts_as_absent(file, damage):
    file.save({"step": 1, "weights": torch.randn(1000)})
    raw = bytearray(file.path.read_bytes())
    raw[len(raw) // 2] ^= 1
    content = {"truncate": bytes(raw[: len(raw) // 2]), "flip": bytes(raw), "empty": b"", "garbage": b"x" * 4000}
    if damage == "remove":
        file.path.unlink()
    else:
        file.path.write_bytes(content[damage])
    assert file.load() is None


def test_a_kill_while_writing_leaves_the_last_complete_one(file, monkeypatch):
    file.save({"step": 1})

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        file.save({"step": 2})
    assert file.load()["step"] == 1


def test_an_ended_trial_leaves_no_checkpoint(file):
    file.save({"step": 1})
    file.save({"step": 2})
    file.remove()
    assert list(file.path.parent.iterdir()) == []
    file.remove()


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(file, monkeypatch):
    file.save({"seen": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    file.save({"seen": 2})
    assert file.load() == {"seen": 1}
    assert [path.name for path in file.path.parent.iterdir()] == ["trial.ckpt"]


def full_disk(_):
    raise OSError(errno.ENOSPC, "No space left on device")
