"""Each study of benchmarks/studies runs from its command to its table, at a tiny size."""

import copy
import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import normkit
from benchmarks.studies.online import METHODS, recovery, run
from benchmarks.studies.runs import rate_search
from benchmarks.studies.standardized import standardized
from normkit.study.factory import load_factory
from normkit.study.folder import StudyFolder
from normkit.study.models import build_model
from normkit.study.records import StudyRecord

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with random images in place of CIFAR-10, decoded already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    sizes = {"train": 200, "validation": 40, "test": 40}
    splits = {
        name: (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10)
        for name, n in sizes.items()
    }
    torch.save(splits, tmp_path / "runs" / "cifar10.pt")
    return tmp_path


@pytest.fixture
def study(monkeypatch, capsys):
    """Runs a study's command, and returns what it prints."""
    threads = torch.get_num_threads()

    def command(name, *options):
        monkeypatch.setattr("sys.argv", [name, *map(str, options)])
        import_module(f"benchmarks.studies.{name}").main()
        return capsys.readouterr().out

    yield command
    torch.set_num_threads(threads)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["colours", "classes"])
def test_every_method_fine_tunes_from_the_same_network_and_no_run_is_repeated(images, study, monkeypatch, target):
    monkeypatch.setattr("benchmarks.studies.runs.MORE", 1)
    command = ("fine_tuning", "--target", target, "--batch-sizes", 2, "--seeds", 2, "--examples", 10, "--pretrain", 64)
    study(*command)
    found = lines(images / "runs" / "fine_tuning.jsonl")
    keys = [(run["method"], run["lr"], run["seed"]) for run in found]
    assert len(keys) == len(set(keys))
    assert len({run["method"] for run in found}) == 9
    others = ("instance", "group", "group+bnp")  # these do not compute the trained network's function
    assert len({run["start"] for run in found if run["method"] not in others and run["seed"] == 0}) == 1
    study(*command)
    assert lines(images / "runs" / "fine_tuning.jsonl") == found
    table = study("fine_tuning", "--table")
    assert f"{target}, batch size 2, 10 samples" in table
    assert table.count("(2)") == 3 * 9


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_stream_and_its_accuracy_is_read_in_every_window(method):
    splits = {"train": (torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8), torch.arange(32) % 10)}
    found = run({"method": method, "images": 32, "lr": 0.01, "seed": 0}, splits)
    assert found["finite"]
    assert len(found["windows"]) == 32
    assert found["accuracy"] == pytest.approx(sum(found["windows"]) / 32, abs=0.01)


@pytest.mark.slow
def test_streams_that_judge_are_others_than_chose_the_rate(images, study):
    study("online", "--images", 32, "--seeds", 2, "--methods", "none", "batchless")
    found = lines(images / "runs" / "online.jsonl")
    for method in ("none", "batchless"):
        rates = {seed: {r["lr"] for r in found if r["method"] == method and r["seed"] == seed} for seed in range(3)}
        assert len(rates[0]) > 1
        assert rates[1] == rates[2] < rates[0]
    table = study("online", "--table")
    assert "32 images" in table
    assert table.count("(2)") == 2  # the two seeds that judge, without that of the search


def test_recovery_is_the_first_window_at_the_accuracy_before_the_shift():
    windows = [50.0] * 8 + [10.0, 30.0, 49.0, 50.0] + [60.0] * 12 + [20.0] * 8
    result = {"windows": windows, "images": 3200}
    assert recovery(result, 1) == (50.0, 10.0, 400.0)
    before, after, back = recovery(result, 3)
    assert (before, after) == (60.0, 20.0)
    assert math.isnan(back)


def test_the_rate_search_extends_its_grid_until_the_best_is_inside_and_then_ends():
    tried = []

    def trial(lr):
        tried.append(lr)
        return {"score": -abs(math.log10(lr / 0.01))}

    assert rate_search(0.1, trial, lambda result: result["score"]) == 0.01
    assert sorted(tried) == [0.0032, 0.01, 0.032, 0.1, 0.32]


@pytest.mark.slow
def test_accumulation_compares_methods_with_each_size_of_micro_batches(images, study, monkeypatch):
    monkeypatch.setattr("benchmarks.studies.accumulation.METHODS", ["batch", "group"])
    monkeypatch.setattr("benchmarks.studies.accumulation.DIVIDED", ["batch"])
    short = ("--budget", 128, "--validation", 0.2, "--seeds", 1, "--lr-points", 1, "--micro-batches", 0, 8)
    out = study("accumulation", "--data", "digits", *short, "--out", images / "out")
    for name in ("whole", "8"):
        assert f"micro-batches: {name}" in out
        assert (images / "out" / name / "report.html").exists()


@pytest.mark.parametrize("name", ["task", "intensity"])
def test_volumes_train_and_are_judged_on_others_than_chose_the_rate(name):
    volumes = ROOT / "benchmarks/studies/volumes.py"
    task = load_factory(f"{volumes}:{name}", "task", lambda found: isinstance(found, normkit.Task))
    first = [split[0][0] for split in (task.train, task.validation, task.test)]
    assert not any(torch.equal(a, b) for a, b in zip(first, first[1:] + first[:1], strict=True))
    model = task.model()
    batch = tuple(torch.stack(tensors) for tensors in zip(task.train[0], task.train[1], strict=True))
    task.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    masks = batch[1]
    assert task.score(lambda _: masks - 0.5, [batch]) == 1  # the masks themselves
    assert task.score(lambda _: 0 * masks - 1, [batch]) == 0


def test_in_absolute_intensity_only_lesions_are_masked():
    task = load_factory(
        f"{ROOT}/benchmarks/studies/volumes.py:intensity", "task", lambda found: isinstance(found, normkit.Task)
    )
    inside = torch.cat([volume[mask > 0] for volume, mask in (task.train[i] for i in range(20))])
    assert inside.mean().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("name", ["cifar10-cnn4-one", "volumes"])
def test_a_study_goes_on_from_its_report(name, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = ROOT / "docs" / "results" / f"{name}.json"
    written = json.loads(results.read_text())
    published = StudyRecord.from_dict(written["record"])
    folder = Path(study("restore", results).strip())
    assert folder.parent == Path("runs")
    restored = json.loads((folder / "results.json").read_text())
    assert restored["summaries"] == written["summaries"]
    again = StudyRecord.from_dict(restored["record"])
    assert sorted(again.trials, key=lambda trial: trial.key) == sorted(published.trials, key=lambda trial: trial.key)
    kept = StudyFolder.read(folder)
    store = kept.address(None).store()
    store.open(replace(kept.config, seeds=kept.config.seeds + 1))
    waiting = []
    while (claim := store.claim()) is not None:
        waiting.append(claim.key)
    assert {key.method for key in waiting} == {*kept.config.methods}
    assert {(key.phase, key.seed) for key in waiting} == {("final", kept.config.seeds)}
    with pytest.raises(SystemExit, match="holds a study already"):
        study("restore", results)


def test_the_standardized_network_is_that_of_its_recipe_and_bnp_steps_all_of_its_layers(caplog):
    def trained(model, recipe):
        model, optimizer = normkit.apply(recipe, model, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
            optimizer.step()
        return model(x).detach()

    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    ours = standardized((3, 32, 32), 10)
    torch.manual_seed(0)
    plain = build_model("cnn4", input_shape=(3, 32, 32), classes=10)
    torch.testing.assert_close(trained(copy.deepcopy(ours), "group"), trained(plain, "group+ws"), rtol=1e-4, atol=1e-4)
    caplog.set_level("INFO", "normkit")
    normkit.apply("group+bnp", ours, lr=0.1)
    assert "5 of 5 modules with weights preconditioned" in caplog.text
