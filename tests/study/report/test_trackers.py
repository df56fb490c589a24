"""Trackers: each result is sent once through the tracker's own client, and no tracker can end a study."""

import sys
from types import ModuleType

import pytest

from normkit.study.errors import StudyError
from normkit.study.records import CurvePoint, TrialKey, TrialResult
from normkit.study.report.trackers import Tracker


def result(seed, **values):
    key = TrialKey("final", "bnp", 8, 0.1, seed)
    curve = (CurvePoint(8, 2.0), CurvePoint(16, 1.0, 0.5))
    return TrialResult(key, "finished", validation_score=0.5, test_score=0.25, curve=curve, **values)


class Client(ModuleType):
    """Takes note of every call, as wandb, trackio and mlflow take them."""

    def __init__(self, name, fails=False):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            if self.fails:
                raise ConnectionError("server away")
            self.calls.append((name, args, kwargs))
            return self

        return call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.calls.append(("end_run", (), {}))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_trial_becomes_one_run_with_its_curve(name, tmp_path, monkeypatch):
    client = Client(name)
    monkeypatch.setitem(sys.modules, name, client)
    Tracker(name, tmp_path, "study").update([result(0)])
    names = [call[0] for call in client.calls]
    assert names == ["init", "log", "log", "log", "finish"]
    assert client.calls[0][2]["config"]["method"] == "bnp"
    assert client.calls[0][2]["name"] == "final-bnp-batch8-lr0.1-seed0"
    assert client.calls[2][1][0] == {"examples": 16, "train_loss": 1.0, "validation_accuracy": 0.5}
    assert client.calls[3][1][0]["end/test_accuracy"] == 0.25


def test_mlflow_gets_an_experiment_with_runs(tmp_path, monkeypatch):
    client = Client("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", client)
    Tracker("mlflow", tmp_path, "study").update([result(0)])
    assert [call[0] for call in client.calls] == [
        *("set_experiment", "start_run", "log_params", "log_metrics", "log_metrics", "log_metrics", "end_run"),
    ]


def test_each_result_is_sent_once_also_after_a_restart(tmp_path, monkeypatch):
    client = Client("wandb")
    monkeypatch.setitem(sys.modules, "wandb", client)
    tracker = Tracker("wandb", tmp_path, "study")
    tracker.update([result(0)])
    tracker.update([result(0), result(1)])
    Tracker("wandb", tmp_path, "study").update([result(0), result(1), result(2)])
    assert [call[2]["name"][-1] for call in client.calls if call[0] == "init"] == ["0", "1", "2"]


def test_a_failing_tracker_says_so_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", Client("wandb", fails=True))
    tracker = Tracker("wandb", tmp_path, "study")
    for _ in range(3):
        tracker.update([result(0)])
    assert caplog.messages == ["--track wandb stopped: ConnectionError: server away"]


def test_tensorboard_files_hold_the_curve(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Tracker("tensorboard", tmp_path, "study").update([result(0)])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "final-bnp-batch8-lr0.1-seed0"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(8, 2.0), (16, 1.0)]
    assert [e.value for e in events.Scalars("end/test_accuracy")] == [0.25]


def test_unknown_and_absent_trackers_are_explained(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="did you mean 'wandb'"):
        Tracker("wandbb", tmp_path, "study")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(StudyError, match=r"--track mlflow: .*pip install mlflow"):
        Tracker("mlflow", tmp_path, "study")
