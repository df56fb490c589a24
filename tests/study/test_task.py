"""Any task: what holds for classification holds for it, and what is wrong with it is told before the first run."""

import dataclasses
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import normkit
from normkit.cli.main import main
from normkit.study.check import check
from normkit.study.config import StudyConfig
from normkit.study.data.batches import batches, evaluation_batches
from normkit.study.data.structure import map_tensors, to_device
from normkit.study.errors import StudyError
from normkit.study.load import load_task
from normkit.study.plan import choose_lr
from normkit.study.records import Metric, TrialKey, TrialResult
from normkit.study.report.statistics import Paired, direction
from normkit.study.train import loop as loop_module
from normkit.study.train.loop import prepare, training_step
from normkit.study.train.trial import build_trial, run_trial
from normkit.study.train.weights import BestWeights

CONFIG = StudyConfig(task="lines", methods=("batch", "none"), batch_sizes=(6,), budget=72, lr=0.05)
KEY = TrialKey("final", "batch", 6, 0.05, 0)


class Lines(Dataset):
    """Pairs on a noisy line, the noise drawn anew from each of the three generators with every access."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        x = (
            torch.tensor([index / self.count, 1.0])
            + 0.1 * torch.rand(2)
            + 0.1 * random.random()
            + 0.1 * np.random.rand()
        )
        return {"x": x, "y": x.sum(0, keepdim=True)}


def build():
    return nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def worst(model, parts):
    return max(float((model(batch["x"]) - batch["y"]).abs().max()) for batch in parts)


def lines(**changes):
    given = {"model": build, "train": Lines(40), "test": Lines(11), "loss": squared, "score": worst}
    options = {"metric": "largest error", "unit": "m", "higher_is_better": False, "inputs": lambda batch: batch["x"]}
    return normkit.Task("lines", **{**given, **options, **changes})


@pytest.fixture(scope="module")
def task():
    return lines().with_validation(0.25)


class Killed(BaseException):
    """Stands for a kill."""


def result_of(trial):
    return dataclasses.replace(trial, seconds=0.0, validation_seconds=0.0)


@pytest.mark.parametrize("method", ["batch", "bnp", "batchless"])
def test_a_killed_run_with_random_samples_and_dropout_goes_on_exactly(task, method, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "CHECKPOINT_SECONDS", 0.0)
    key, points = dataclasses.replace(KEY, method=method, lr=0.005), iter(range(5))
    whole = run_trial(CONFIG, key, task)

    def kill(_):
        if next(points) == 4:
            raise Killed
        return False

    with pytest.raises(Killed):
        run_trial(CONFIG, key, task, folder=tmp_path, on_point=kill)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert result_of(run_trial(CONFIG, key, task, folder=tmp_path)) == result_of(whole)
    assert whole.state == "finished"


def test_fetching_in_other_processes_changes_nothing(task):
    here = run_trial(CONFIG, KEY, task)
    assert result_of(run_trial(dataclasses.replace(CONFIG, data_workers=2), KEY, task)) == result_of(here)


def test_unequal_micro_batches_make_the_step_of_the_whole_batch(task):
    plain = lines(model=lambda: nn.Sequential(nn.Linear(2, 1)))
    weights = []
    for micro in (0, 4):
        config = dataclasses.replace(CONFIG, micro_batch=micro)
        model, optimizer = build_trial(config, dataclasses.replace(KEY, method="none"), plain)
        batch = next(plain.training_batches(batch_size=6, budget=6, seed=0, micro_batch=micro))
        assert [part.samples for part in batch] == ([4, 2] if micro else [6])
        whole = next(plain.training_batches(batch_size=6, budget=6, seed=0))[0].batch
        fixed = map_tensors(torch.clone, whole)
        pieces, start = [], 0
        for part in batch:
            cut = slice(start, start + part.samples)
            pieces.append(part._replace(batch=map_tensors(lambda t, cut=cut: t[cut], fixed)))
            start += part.samples
        training_step(prepare(config, model, plain.training_loss), optimizer, pieces, config)
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_samples_of_each_batch(ranks):
    class Numbers(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return index

    def seen(share):
        steps = batches(Numbers(), batch_size=4, budget=27, seed=1, share=share)
        return [[int(i) for micro in step for i in micro.batch] for step in steps]

    whole, parts = seen((0, 1)), [seen((rank, ranks)) for rank in range(ranks)]
    assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == whole
    assert len(whole[-1]) == 3


@pytest.mark.parametrize(("sample", "fetched"), [(torch.zeros(3), 16), (torch.zeros(2**18), 1), (object(), 1)])
def test_small_batches_are_fetched_in_a_row_and_large_ones_when_they_are_needed(sample, fetched):
    seen = []

    class Noted(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            seen.append(index)
            return sample

    steps = batches(Noted(), batch_size=1, budget=40, seed=1, collate=lambda samples: samples)
    next(steps)
    assert len(seen) == fetched
    assert len(list(steps)) == 39
    assert len(seen) == 40


def test_a_batch_of_any_structure_is_moved_and_nothing_else():
    @dataclasses.dataclass
    class Graph:
        nodes: torch.Tensor
        name: str

    batch = (Graph(torch.ones(2), "a"), [torch.zeros(1)], {"text": "b", "n": 3})
    moved = to_device(batch, "meta")
    assert moved[0].nodes.is_meta
    assert moved[1][0].is_meta
    assert (moved[0].name, moved[2]) == ("a", {"text": "b", "n": 3})


def test_evaluation_reads_every_sample_once():
    sizes = [len(batch["x"]) for batch in evaluation_batches(Lines(11), batch_size=4)]
    assert sizes == [4, 4, 3]


def test_a_score_that_is_not_a_number_is_a_diverged_run(task):
    broken = dataclasses.replace(task, score=lambda *_: float("nan"))
    trial = run_trial(CONFIG, KEY, broken)
    assert (trial.state, trial.test_score) == ("diverged", None)
    assert "largest error is not finite" in trial.error


def test_where_lower_is_better_the_lowest_score_wins():
    searched = [
        TrialResult(TrialKey("search", "a", 1, lr, 0), "finished", validation_score=lr) for lr in (0.3, 0.1, 0.2)
    ]
    assert (choose_lr(searched), choose_lr(searched, higher_is_better=False)) == (0.3, 0.1)
    best = BestWeights(nn.Linear(1, 1), higher_is_better=False)
    for step, score in enumerate((3.0, 1.0, 2.0), start=1):
        best.offer(score, step)
    assert (best.score, best.step) == (1.0, 2)
    behind = Paired(0.5, 0.1, 0.9, 3)
    assert [direction(behind, Metric("x", "", up), tested=False) for up in (True, False)] == [1, -1]


def raising(index):
    class Broken(Lines):
        def __getitem__(self, i):
            if i == index:
                raise KeyError("no file")
            return super().__getitem__(i)

    return Broken(40)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Lines(40))


class Uneven(Lines):
    def __getitem__(self, index):
        return {"x": torch.ones(2 + index % 2), "y": torch.ones(1)}


def unseeded():
    model = build()
    with torch.no_grad():
        model[0].weight.normal_(generator=torch.Generator().manual_seed(random.SystemRandom().getrandbits(32)))
    return model


ONE = build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": lambda m, b: (m(b["x"]) - b["y"]).square()},
            r"the loss is a tensor of shape \(2, 1\); return one scalar",
        ),
        ({"loss": lambda m, b: squared(m, b).detach()}, "the loss has no gradient"),
        ({"loss": lambda m, b: squared(m, b).item()}, "the loss is a float; return one scalar"),
        ({"loss": lambda m, b: m(b["z"])}, "the loss raised KeyError: 'z'"),
        ({"score": lambda m, bs: torch.ones(3)}, r"the score is a tensor of shape \(3,\); return one number"),
        ({"score": lambda m, bs: "good"}, "the score is a str; return one number"),
        ({"score": lambda m, bs: {}["dice"]}, "the score raised KeyError"),
        ({"test": raising(39)}, r"test\[39\] raised KeyError: 'no file'"),
        ({"train": Uneven(40)}, r"samples \d+ and \d+ do not collate: field \['x'\] has shapes \(\d,\) and \(\d,\)"),
        ({"model": unseeded}, "changes when it is built twice with one seed"),
        ({"model": lambda: ONE}, "returned the same weights twice"),
        ({"model": lambda: 3}, "is a int; Task"),
        ({"model": lambda: nn.Linear(2, 1) / 2}, "TypeError"),
        ({"test": Lines(0)}, "test has no samples"),
        ({"loss": lambda m, b: squared(m, b)[None]}, r"the loss is a tensor of shape \(1,\); return one scalar"),
        ({"train": Endless(), "validation": None}, "Endless has no length; give a map-style dataset"),
        ({"train": Endless(), "validation": Lines(8)}, "Endless has no length; give a map-style dataset"),
        ({"test": Endless()}, "test: Endless has no length; give a map-style dataset"),
    ],
)
def test_what_is_wrong_with_a_task_is_one_line_before_the_first_run(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(CONFIG, lines(**changes))
    assert "\n" not in str(caught.value)


def test_a_loss_that_sums_over_the_samples_is_told(caplog):
    net = {"model": lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))}
    check(CONFIG, lines(**net))
    assert "seems to sum" not in caplog.text
    check(CONFIG, lines(**net, loss=lambda m, b: (m(b["x"]) - b["y"]).square().sum()))
    assert "the loss doubles with a batch of twice the samples, so it seems to sum" in caplog.text


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import normkit

x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, x.sum(1, keepdim=True))

def build():
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

def task():
    return normkit.Task.regression("sums", build, data, data, unit="m")

number = 3
"""
QUICK = {"methods": ["batch", "none"], "batch_sizes": [8], "budget": 48, "seeds": 1, "lr": 0.05, "quiet": True}


@pytest.fixture
def script(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flip", "--crop", "1"], "--flip, --crop: --task"),
        (["--data", "spiral"], "--data: --task"),
        (["--label-smoothing", "0.1"], "--label-smoothing: --task"),
    ],
)
def test_options_of_named_data_have_no_meaning_for_a_task(script, options, message, capsys):
    assert main(["compare", "--task", f"{script}:task", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "landscape", "doctor"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("tusk", "has no task 'tusk'"), ("number", "has no task 'number'"), ("build", "is a Sequential")],
)
def test_a_task_that_is_none_is_named_by_every_command(script, command, name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--task", f"{script}:{name}"]) == 2
    assert message in capsys.readouterr().err


def test_landscape_and_doctor_take_a_task(script, tmp_path, capsys):
    arguments = ["--task", f"{script}:task", "--batch-size", "8"]
    out = tmp_path / "landscape"
    assert (
        main(["landscape", *arguments, "--methods", "batch,none", "--steps", "4", "--every", "2", "--out", str(out)])
        == 0
    )
    assert "test RMSE" in (out / "landscape.md").read_text()
    assert main(["doctor", *arguments]) in (0, 1)


def test_a_task_in_memory_is_compared_in_this_process_and_resumed(tmp_path):
    first = normkit.compare(lines(), out=tmp_path / "out", **QUICK)
    assert first.record.metric == Metric("largest error", "m", higher_is_better=False)
    assert "normkit.compare(task, methods=" in first.record.command
    table = first.table()
    assert list(table["method"]) == ["batch", "none"]
    assert table["test_score"].notna().all()
    assert "<table" in first._repr_html_()
    assert str(first).splitlines()[0] == first.verdict.sentence
    again = normkit.compare(lines(), out=tmp_path / "out", **QUICK)
    assert again.record.trials == first.record.trials
    with pytest.raises(ValueError, match="--out"):
        normkit.compare(lines(), out=tmp_path / "out", **{**QUICK, "budget": 96})


def test_a_study_extended_later_has_the_trials_of_one_that_had_everything_from_the_start(tmp_path):
    grown = {**QUICK, "methods": ["group", *QUICK["methods"]], "seeds": QUICK["seeds"] + 1}
    first = normkit.compare(lines(), out=tmp_path / "out", **QUICK)
    second = normkit.compare(lines(), out=tmp_path / "out", **grown)
    whole = normkit.compare(lines(), out=tmp_path / "whole", **grown)
    assert set(first.record.trials) < set(second.record.trials)
    scores = [{t.key: t.test_score for t in result.record.trials} for result in (second, whole)]
    assert scores[0] == scores[1]
    assert {cost.method for cost in second.record.costs} == set(grown["methods"])
    added = f"Added after trials had ended: `group` and 1 of {grown['seeds']} seeds."
    assert added in (tmp_path / "out" / "report.md").read_text()
    assert "Added after" not in (tmp_path / "whole" / "report.md").read_text()
    assert repr(grown["methods"]) in second.record.command
    with pytest.raises(StudyError, match="may be added"):
        normkit.compare(lines(), out=tmp_path / "out", **QUICK)


def test_numbers_of_numpy_and_options_left_out_are_plain_ones(tmp_path):
    seeds, sizes, rate = np.int64(1), [np.int64(8)], np.float64(0.05)
    given = {**QUICK, "seeds": seeds, "batch_sizes": sizes, "lr": rate, "margin": None, "limit": None}
    command = normkit.compare(lines(), out=tmp_path / "out", **given).record.command
    assert "seeds=1, lr=0.05)" in command
    again = normkit.compare(lines(), out=tmp_path / "out", **QUICK)
    assert again.record.config["seeds"] == 1


def test_bad_calls_are_one_line(tmp_path):
    with pytest.raises(StudyError, match="unknown option 'metods'; did you mean 'methods'"):
        normkit.compare(lines(), metods=["batch"])
    with pytest.raises(StudyError, match="methods='batch'; give a list"):
        normkit.compare(lines(), methods="batch")
    for options, message in (
        ({"optimizer": "lion"}, "optimizer='lion'; give 'sgd' or 'nesterov' or"),
        ({"budget": 96.0}, "budget=96.0; give int"),
        ({"batch_sizes": [8.0]}, "batch_sizes=.* give tuple"),
        ({"lr": "0.1"}, "lr='0.1'; give float or dict.* or 'auto'"),
        ({"flip": 1}, "flip=1; give bool"),
    ):
        with pytest.raises(StudyError, match=message):
            normkit.compare(lines(), out=tmp_path / "out", **{**QUICK, **options})
    with pytest.raises(StudyError, match="workers=2: processes cannot import task 'lines'"):
        normkit.compare(lines(), workers=2, **QUICK)


def test_a_task_file_imports_the_modules_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "networks_beside.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(3, 1)\n")
    file = tmp_path / "importing.py"
    before, body = SCRIPT.split("def build():\n")[0], "def task():" + SCRIPT.split("def task():")[1]
    file.write_text(f"{before}from networks_beside import build\n\n{body}")
    assert load_task(f"{file}:task").name == "sums"


@pytest.mark.slow
def test_a_task_whose_samples_are_drawn_anew_in_every_process_is_refused(tmp_path, capsys):
    file = tmp_path / "drawn.py"
    file.write_text(
        SCRIPT.replace("generator=torch.Generator().manual_seed(0)", "generator=GENERATOR").replace(
            "x = torch", "GENERATOR = torch.Generator()\nGENERATOR.seed()\nx = torch"
        )
    )
    options = [
        "--methods",
        "batch,none",
        "--batch-sizes",
        "8",
        "--budget",
        "48",
        "--seeds",
        "1",
        "--lr",
        "0.05",
        "--quiet",
    ]
    command = ["compare", "--task", f"{file}:task", *options, "--workers", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "has other samples in every process; draw them from generators with a seed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_is_imported_by_its_workers_or_told_how(script, guarded, tmp_path):
    call = f"normkit.compare(task, out={str(tmp_path / 'out')!r}, workers=2, **{QUICK!r})"
    script.write_text(SCRIPT + (f"if __name__ == '__main__':\n    {call}\n" if guarded else f"{call}\n"))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=250, check=False)
    if guarded:
        assert done.returncode == 0, done.stderr[-2000:]
        assert (tmp_path / "out" / "report.html").exists()
    else:
        assert 'call normkit.compare under `if __name__ == "__main__":`' in done.stderr


@pytest.mark.slow
def test_a_script_that_compares_named_data_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "named.py"
    script.write_text(f"import normkit\nnormkit.compare(out={str(tmp_path / 'out')!r}, workers=2, **{QUICK!r})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode
    assert 'call normkit.compare under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
