"""A trial: deterministic, the same task and weights for every method, nothing raised."""

import dataclasses
from functools import partial

import pytest
import torch

from normkit.study.config import StudyConfig
from normkit.study.load import load
from normkit.study.train import loop, trial
from normkit.study.train.trial import build_trial, evaluate_once, run_trial, train_eval_gap
from tests.study.train.trials import key as any_key
from tests.study.train.trials import without_time

CONFIG = StudyConfig(model="digits-cnn", methods=("batch", "none"), batch_sizes=(16,), budget=160)
key = partial(any_key, lr=0.05)


@pytest.fixture(scope="module")
def task():
    return load(CONFIG)


def test_the_same_key_gives_the_same_result_bit_for_bit(task):
    assert without_time(run_trial(CONFIG, key(), task)) == without_time(run_trial(CONFIG, key(), task))


def test_another_seed_gives_another_result(task):
    assert run_trial(CONFIG, key(), task).curve != run_trial(CONFIG, key(seed=1), task).curve


def test_methods_start_from_the_same_weights(task):
    plain, _ = build_trial(CONFIG, key("none"), task)
    normalised, _ = build_trial(CONFIG, key("batch"), task)
    weights = [[m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d)] for net in (plain, normalised)]
    assert len(weights[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_settings_of_a_method_reach_it(task):
    model, _ = build_trial(CONFIG, key("revisited:scale=0.25"), task)
    scales = {m.weight[0].item() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert scales == {0.25}
    assert run_trial(CONFIG, key("revisited:scale=-1"), task).state == "failed"


def test_only_final_runs_touch_the_test_split(task, monkeypatch):
    judged = []
    monkeypatch.setattr(
        trial,
        "evaluate_once",
        lambda model, task, split, *rest: judged.append(split) or evaluate_once(model, task, split, *rest),
    )
    search = run_trial(CONFIG, key(phase="search"), task)
    assert (search.state, search.test_score) == ("finished", None)
    assert "test" not in judged
    final = run_trial(CONFIG, key(), task)
    assert final.test_score is not None
    assert judged.count("test") == 1


def test_a_run_sees_exactly_its_budget(task):
    result = run_trial(dataclasses.replace(CONFIG, budget=100), key(size=16), task)
    assert result.curve[-1].examples == 100


def test_a_diverged_run_is_recorded_as_diverged(task):
    result = run_trial(CONFIG, key("none", lr=1e6), task)
    assert (result.state, result.test_score) == ("diverged", None)
    assert "not finite" in result.error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError("no memory"), RuntimeError("bad")])
def test_a_failing_run_is_recorded_with_its_error(task, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(loop, "training_step", broken)
    result = run_trial(CONFIG, key(), task)
    assert result.state == "failed"
    assert result.error == f"{type(error).__name__}: {error}"


def test_the_gap_is_measured_without_a_trace(task):
    model, _ = build_trial(CONFIG, key(), task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sample = [micro.batch for (micro,) in task.training_batches(batch_size=16, budget=64, seed=0)]
    assert train_eval_gap(model, sample, task.loss) != 0.0  # running statistics are still (0, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain, _ = build_trial(CONFIG, key("none"), task)
    assert train_eval_gap(plain, sample, task.loss) == 0.0
