"""What a user's data and model can get wrong is told before the first run."""

from dataclasses import replace

import pytest

from normkit.cli.main import main
from normkit.study.check import check
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.load import load

OWN = """
import torch
from torch import nn

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()

def data(): return (X, Y), None, (X, Y)
def one_class(): return (X, Y * 0), None, (X, Y)
def from_one(): return (X, Y + 1), None, (X, Y + 1)
def identifiers(): return (X, Y * 10**5), None, (X, Y)

def net(norm):
    return nn.Sequential(nn.Linear(5, 8, bias=False), norm, nn.ReLU(), nn.Linear(8, 2))
def model(shape, classes): return net(nn.BatchNorm1d(8))
def bare(shape, classes): return net(nn.Identity())
def layer_norm(shape, classes): return net(nn.LayerNorm(8))
def frozen(shape, classes): return net(nn.BatchNorm1d(8)).requires_grad_(False)
def narrow(shape, classes): return nn.Linear(4, classes)
ONE = net(nn.BatchNorm1d(8))
def shared(shape, classes): return ONE
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)

    def configured(data="data", model="model", methods="none,batch"):
        file = tmp_path / "own.py"
        names = tuple(methods.split(","))
        return StudyConfig(data=f"{file}:{data}", model=f"{file}:{model}", methods=names, batch_sizes=(8,), budget=64)

    return configured


def test_good_data_and_a_good_model_pass(own):
    task = check(own(methods="none,batch,group,layer,bnp,batchless,l1,sgd-g,revisited,batch-renorm,noisy-batch"))
    assert task.summary.endswith("of 2 classes, 5 inputs")


def test_classes_that_training_never_shows_are_told(own):
    assert "of 3 classes (2 of them in training)" in load(own(data="from_one")).summary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "one_class"}, "all training examples are of one class"),
        ({"data": "identifiers"}, "its 48 training examples have labels up to 100000; number the classes 0, 1, 2"),
        ({"model": "frozen"}, "has no weights that are trained"),
        ({"model": "bare"}, "--methods: none, batch would all train"),
        ({"model": "bare", "methods": "bnp,group,batch-renorm"}, "--methods: group, batch-renorm would all train"),
        ({"model": "layer_norm", "methods": "none,batch,group"}, "--methods: batch, group would all train"),
    ],
)
def test_what_no_study_can_use_is_refused(own, given, message):
    with pytest.raises(StudyError, match=message):
        check(own(**given))


def test_a_factory_that_hands_out_one_model_is_refused(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # a module is imported once, where a file is read again and again
    config = replace(own(), model="own:shared")
    with pytest.raises(StudyError, match="the factory returned the same weights twice"):
        check(config)


@pytest.mark.parametrize("given", [{"model": "bare", "methods": "none,bnp"}, {"model": "layer_norm"}])
def test_a_model_without_batch_normalization_is_compared_where_methods_differ(own, given):
    check(own(**given))


@pytest.mark.parametrize("command", ["compare", "doctor", "landscape"])
def test_a_model_that_does_not_fit_the_data_is_named_by_every_command(command, own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = own(data="data", model="narrow")
    arguments = ["--batch-sizes", "8"] if command == "compare" else ["--batch-size", "8"]
    assert main([command, "--data", config.data, "--model", config.model, *arguments]) == 2
    assert "narrow: cannot take inputs of shape (2, 5) from --data" in capsys.readouterr().err


def test_landscape_goes_on_without_a_method_that_cannot_run(tmp_path, capsys):
    arguments = ["--data", "spiral", "--model", "mlp", "--methods", "none,batch", "--batch-size", "1", "--steps", "2"]
    assert main(["landscape", *arguments, "--every", "1", "--limit", "60", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "landscape.md").read_text()
    assert "No landscape of batch: ValueError: Expected more than 1 value per channel" in page
    assert "| none |" in page
    assert "| batch |" not in page
