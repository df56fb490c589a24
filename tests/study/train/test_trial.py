"""A trial: deterministic, the same data and weights for every method, nothing raised."""

import dataclasses
from functools import partial

import pytest
import torch

from normkit.study.config import StudyConfig
from normkit.study.data.batches import batches
from normkit.study.train import loop, trial
from normkit.study.train.trial import build_trial, evaluate, load, run_trial, train_eval_gap
from tests.study.train.trials import key as any_key
from tests.study.train.trials import without_time

CONFIG = StudyConfig(methods=("batch", "none"), batch_sizes=(16,), budget=160)
key = partial(any_key, lr=0.05)


@pytest.fixture(scope="module")
def data():
    return load(CONFIG)


def test_the_same_key_gives_the_same_result_bit_for_bit(data):
    assert without_time(run_trial(CONFIG, key(), data)) == without_time(run_trial(CONFIG, key(), data))


def test_another_seed_gives_another_result(data):
    assert run_trial(CONFIG, key(), data).curve != run_trial(CONFIG, key(seed=1), data).curve


def test_methods_start_from_the_same_weights(data):
    plain, _ = build_trial(CONFIG, key("none"), data)
    normalised, _ = build_trial(CONFIG, key("batch"), data)
    weights = [[m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d)] for net in (plain, normalised)]
    assert len(weights[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_only_final_runs_touch_the_test_split(data, monkeypatch):
    judged = []
    monkeypatch.setattr(
        trial, "evaluate", lambda model, data, split, *rest: judged.append(split) or evaluate(model, data, split, *rest)
    )
    search = run_trial(CONFIG, key(phase="search"), data)
    assert (search.state, search.test_accuracy) == ("finished", None)
    assert not any(split is data.test for split in judged)
    final = run_trial(CONFIG, key(), data)
    assert final.test_accuracy is not None
    assert sum(split is data.test for split in judged) == 1


def test_a_run_sees_exactly_its_budget(data):
    result = run_trial(dataclasses.replace(CONFIG, budget=100), key(size=16), data)
    assert result.curve[-1].examples == 100


def test_a_diverged_run_is_recorded_as_diverged(data):
    result = run_trial(CONFIG, key("none", lr=1e6), data)
    assert (result.state, result.test_accuracy) == ("diverged", None)
    assert "not finite" in result.error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError("no memory"), RuntimeError("bad")])
def test_a_failing_run_is_recorded_with_its_error(data, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(loop, "training_step", broken)
    result = run_trial(CONFIG, key(), data)
    assert result.state == "failed"
    assert result.error == f"{type(error).__name__}: {error}"


def test_the_gap_is_measured_without_a_trace(data):
    model, _ = build_trial(CONFIG, key(), data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample = list(batches(data, data.train, batch_size=16, budget=64, seed=0))
    assert train_eval_gap(model, sample) != 0.0  # running statistics are still (0, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain, _ = build_trial(CONFIG, key("none"), data)
    assert train_eval_gap(plain, sample) == 0.0
