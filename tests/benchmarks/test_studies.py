"""Each study of benchmarks/studies runs from its command to its table, at a tiny size."""

import json
import runpy

import pytest
import torch


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

    def run(name, *options):
        monkeypatch.setattr("sys.argv", [name, *map(str, options)])
        runpy.run_module(f"benchmarks.studies.{name}", run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["colours", "classes"])
def test_every_method_fine_tunes_from_the_same_network_and_no_run_is_repeated(images, study, target):
    command = ("fine_tuning", "--target", target, "--batch-sizes", 2, "--seeds", 2, "--examples", 10, "--pretrain", 64)
    study(*command)
    found = lines(images / "runs" / "fine_tuning.jsonl")
    keys = [(run["method"], run["lr"], run["seed"]) for run in found]
    assert len(keys) == len(set(keys))
    assert len({run["method"] for run in found}) == 8
    same = ("batch", "frozen", "batch-renorm", "batchless", "fold+bnp")  # these compute the trained network's function
    assert len({run["start"] for run in found if run["method"] in same and run["seed"] == 0}) == 1
    study(*command)
    assert lines(images / "runs" / "fine_tuning.jsonl") == found
    table = study("fine_tuning", "--table")
    assert f"{target}, batch size 2, 10 samples" in table
    assert table.count("(2)") == 3 * 8
