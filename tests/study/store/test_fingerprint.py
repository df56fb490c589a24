"""A study that goes on meets the data and the model that it began with, or says that it does not."""

import re

import pytest

from normkit.cli.main import main
from normkit.study.config import StudyConfig
from normkit.study.load import load
from normkit.study.store.fingerprint import check_fingerprint

OWN = """
import random
import numpy as np
import torch
from torch import nn

def data():
    x = torch.randn(60, 5) + np.random.rand() + random.random()
    y = (x[:, 0] > x[:, 1]).long()
    order = torch.randperm(60)
    return (x[order[:40]], y[order[:40]]), None, (x[order[40:]], y[order[40:]])

def model(shape, classes):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))
"""


class Notes(dict):
    """A store's notes."""

    set_attr = dict.__setitem__

    def get_attr(self, name, read=lambda kept: kept):
        return read(self[name]) if name in self else None


@pytest.fixture
def config(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    names = {"data": f"{tmp_path / 'own.py'}:data", "model": f"{tmp_path / 'own.py'}:model"}
    return StudyConfig(**names, methods=("batch",), batch_sizes=(8,), budget=16, seeds=1, lr=0.1)


def test_a_factory_that_draws_gives_every_process_the_same_examples_and_splits(config):
    first, second = load(config).data, load(config).data
    assert first.train.inputs.equal(second.train.inputs)
    assert first.test.labels.equal(second.test.labels)


def test_an_unchanged_study_goes_on(config):
    notes = Notes()
    check_fingerprint(notes, config, load(config))
    assert set(notes["identity"]) == {"data", "model"}
    check_fingerprint(notes, config, load(config))


@pytest.mark.parametrize(
    ("line", "changed", "what"),
    [
        ("y = (x[:, 0] > x[:, 1])", "y = (x[:, 0] > x[:, 2])", "--data"),
        ("x = torch.randn(60, 5)", "x = 3 * torch.randn(60, 5)", "--data"),
        ("order[:40]", "order[:39]", "--data"),
        ("nn.BatchNorm1d(8), ", "", "--model"),
        ("nn.ReLU()", "nn.Tanh()", "--model"),
    ],
)
def test_changed_data_or_model_behind_the_same_name_are_refused(config, tmp_path, line, changed, what):
    notes = Notes()
    check_fingerprint(notes, config, load(config))
    assert line in OWN
    (tmp_path / "own.py").write_text(OWN.replace(line, changed))
    with pytest.raises(ValueError, match=f"^{what} .*has changed since this study began"):
        check_fingerprint(notes, config, load(config))


@pytest.mark.slow
def test_the_command_line_refuses_what_has_changed_and_keeps_the_results(config, tmp_path, capsys):
    command = ["compare", "--data", config.data, "--model", config.model, "--methods", "batch", "--batch-sizes", "8"]
    command += ["--budget", "16", "--seeds", "1", "--lr", "0.1", "--quiet", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    kept = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "own.py").write_text(OWN.replace("nn.ReLU()", "nn.Tanh()"))
    assert main(command) == 2
    assert re.search("--model .* has changed since this study began", capsys.readouterr().err)
    assert (tmp_path / "out" / "results.json").read_bytes() == kept


def test_named_data_is_known_again():
    notes, config = Notes(), StudyConfig(limit=100)
    check_fingerprint(notes, config, load(config))
    check_fingerprint(notes, config, load(config))
    with pytest.raises(ValueError, match="--data digits: has changed since this study began"):
        check_fingerprint(notes, config, load(StudyConfig(limit=90)))
