"""Two data-parallel ranks: every method trains, the ranks agree, and what does not depend on batches is as on one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from normkit.study.load import load
from normkit.study.train.gather_batch import WholeBatch
from normkit.study.train.loop import Loop, LossOf, evaluate
from normkit.study.train.trial import build_trial
from tests.study.train.ranks_program import CONFIG, METHODS, WHOLE, key

pytestmark = pytest.mark.slow  # torchrun
TORCHRUN = [
    sys.executable,
    *("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"),
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
# Accumulated gradients leave these with statistics of each micro-batch, which are other ones on two ranks; online
# normalization follows the samples that its own rank sees.
BY_BATCH = ("online", "batch", "l1", "l2", "linf", "noisy-batch", "batch-renorm", "sgd-g", "adam-g", "revisited")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    program = os.path.join(os.path.dirname(__file__), "ranks_program.py")
    done = subprocess.run(
        [*TORCHRUN, program, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcome.json").read_text())


@pytest.fixture(scope="module")
def task():
    return load(CONFIG)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batches", ["micro", "whole"])
def test_ranks_keep_the_same_weights(outcome, batches, method):
    assert outcome[batches][method]["spread"] == 0.0
    assert outcome[batches][method]["losses"][-1] < 10


def one_process(config, method, task):
    model, optimizer = build_trial(config, key(config, method), task)
    losses = [point.train_loss for point in Loop(config, key(config, method), task, model, optimizer).points()]
    return losses, evaluate(model, task, "test", config)


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith(BY_BATCH)])
def test_two_ranks_accumulate_as_one_process_does(outcome, method, task):
    losses, _ = one_process(CONFIG, method, task)
    assert outcome["micro"][method]["losses"] == pytest.approx(losses, rel=2e-3)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("noisy-batch", "online")]
)  # noise, statistics of a rank
def test_two_ranks_train_on_whole_batches_as_one_process_does(outcome, method, task):
    losses, test = one_process(WHOLE, method, task)
    assert outcome["whole"][method]["losses"] == pytest.approx(losses, rel=2e-3)
    assert outcome["whole"][method]["test"] == pytest.approx(test, rel=2e-3)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(input=x)


def test_layers_called_by_keyword_are_given_the_rows_of_all_ranks(tmp_path):
    x = torch.randn(4, 3)
    expected = ByKeyword()(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = LossOf(ByKeyword(), lambda model, batch: model(batch))
        WholeBatch(network, network)
        torch.testing.assert_close(network(x, 4), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_an_interrupted_run_goes_on_on_both_ranks_exactly(outcome):
    assert outcome["interrupted"] == 0.0


def test_ranks_keep_the_weights_of_the_same_step(outcome):
    assert outcome["best_steps"] == [3, 3]  # the first validated of four steps, as rank 0 saw it


def test_compare_runs_under_torchrun(tmp_path):
    arguments = ["--methods", "batch,none", "--batch-sizes", "32", "--seeds", "1", "--lr-points", "3", "--budget", "96"]
    command = [
        *TORCHRUN,
        "-m",
        "normkit.cli.main",
        "compare",
        *arguments,
        "--prune",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "results.json").read_text())["record"]
    assert record["environment"]["data-parallel ranks"] == "2"
    assert record["environment"]["batch statistics"].startswith("synchronized")
    assert len(record["trials"]) == record["planned"] >= 8  # more where a search extends its grid
    assert {t["state"] for t in record["trials"]} <= {"finished", "pruned"}
    assert all(t["state"] == "finished" for t in record["trials"] if t["key"]["phase"] == "final")
