"""The exit code is the command's: 0 done, 1 nothing to show or a sick model, 2 bad input, 128 + n stopped by a signal."""

import os
import signal
import sys

import pytest

from normkit.cli.main import main
from normkit.cli.stop import Stopped, stoppable
from normkit.cli.study import exit_code
from normkit.study.records import StudyRecord, TrialKey, TrialResult

HEAD = "import argparse, sys, torch\nfrom torch import nn\n"
GOOD = """
def data():
    x = torch.randn(60, 5)
    y = (x[:, 0] > x[:, 1]).long()
    return (x[:40], y[:40]), None, (x[40:], y[40:])

def model(shape, classes):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))
"""
BAD = {
    "exit at import": "sys.exit(0)" + GOOD,
    "argparse at import": "argparse.ArgumentParser().parse_args(['--no-such'])" + GOOD,
    "exit in the data": GOOD.replace("x = torch.randn(60, 5)", "sys.exit(0)"),
    "exit in the model": GOOD.replace("return nn.Seq", "sys.exit(0); return nn.Seq"),
    "exit in the forward": GOOD
    + "class Exit(nn.Module):\n    def forward(self, x): sys.exit(0)\nbuild = model\n"
    + "def model(shape, classes): return nn.Sequential(build(shape, classes), Exit())\n",
}
TRAINING = GOOD + (
    "class Fails(nn.Module):\n"
    "    def forward(self, x):\n"
    "        if self.training: raise RuntimeError('only in train mode')\n"
    "        return x\n"
    "build = model\n"
    "def model(shape, classes): return nn.Sequential(build(shape, classes), Fails())\n"
)


def command(name, file, tmp_path):
    common = ["--data", f"{file}:data", "--model", f"{file}:model"]
    return {
        "compare": [
            "compare",
            *common,
            "--methods",
            "batch",
            "--batch-sizes",
            "8",
            "--budget",
            "8",
            "--out",
            str(tmp_path / "out"),
        ],
        "landscape": ["landscape", *common, "--methods", "batch", "--steps", "2", "--out", str(tmp_path / "out")],
        "doctor": ["doctor", *common],
    }[name]


@pytest.mark.parametrize("name", ["compare", "landscape", "doctor"])
@pytest.mark.parametrize("kind", BAD)
def test_a_file_of_the_user_s_that_ends_the_program_is_bad_input(name, kind, tmp_path, capsys):
    (tmp_path / "own.py").write_text(HEAD + BAD[kind])
    assert main(command(name, tmp_path / "own.py", tmp_path)) == 2
    assert "SystemExit" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_in_train_mode_is_refused_before_the_first_run(tmp_path, capsys):
    (tmp_path / "own.py").write_text(HEAD + TRAINING)
    assert main(command("compare", tmp_path / "own.py", tmp_path)) == 2
    assert "RuntimeError: only in train mode" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def trial(phase, state):
    return TrialResult(TrialKey(phase, "batch", 8, 0.1, 0), state, error="out of memory")


@pytest.mark.parametrize(
    ("states", "code"), [(["failed", "failed"], 1), (["failed", "finished"], 0), (["failed", "diverged"], 0), ([], 0)]
)
def test_a_study_whose_final_runs_all_failed_does_not_exit_with_0(states, code, capsys):
    trials = (trial("search", "finished"), *(trial("final", state) for state in states))
    assert exit_code(StudyRecord({}, {}, "", trials)) == code
    assert ("every final run failed, the first with: out of memory" in capsys.readouterr().err) == (code == 1)


@pytest.mark.parametrize(("states", "code"), [(["failed", "failed"], 1), (["failed", "finished"], 0)])
def test_a_preset_whose_final_runs_all_failed_does_not_exit_with_0(states, code, tmp_path, monkeypatch, capsys):
    records = [StudyRecord({}, {}, "", (trial("search", "finished"), trial("final", state))) for state in states]
    monkeypatch.setattr("normkit.study.papers.reproduce.reproduce", lambda *_, **__: ("the page", records))
    assert main(["reproduce", "bnp-mlp", "--out", str(tmp_path)]) == code
    assert ("every final run failed, the first with: out of memory" in capsys.readouterr().err) == (code == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_raised_in_the_block_and_nowhere_else(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped):
            killed(number)
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        killed(number)  # under nohup
    finally:
        signal.signal(number, before)


def killed(number):
    with stoppable():
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 1)


def test_ctrl_c_during_the_imports_is_a_line_and_no_traceback(monkeypatch, capsys):
    import builtins

    from normkit.cli import run

    real = builtins.__import__

    def interrupted(name, *rest):
        if name == "normkit.cli.main":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "normkit.cli.main")
    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert run() == 130
    monkeypatch.setattr(builtins, "__import__", real)
    assert capsys.readouterr().err == "\nstopped\n"
