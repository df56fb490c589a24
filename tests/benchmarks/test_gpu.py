"""The command for the day with a GPU, rehearsed on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIECES = ("tests", "steps", "accumulation", "optimizers", "training", "compiled")


def gpu(*options):
    command = [sys.executable, "benchmarks/gpu.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(
    not hasattr(__import__("os"), "fork"), reason="pieces run in forked processes, as CUDA's systems have"
)
@pytest.mark.slow
def test_every_piece_of_the_gpu_command_leaves_its_rows_and_is_not_repeated(tmp_path):
    command = ("--device", "cpu", "--minutes", "2", "--out", str(tmp_path))
    done = gpu(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PIECES}
    for result in found.values():
        assert result["machine"]["torch"]
        assert result["settings"]["device"] == "cpu"
    rows = {name: result["rows"] for name, result in found.items()}
    assert rows["tests"]["summary"]["exit"] == 0, rows["tests"]
    assert rows["tests"]["summary"]["passed"] > 0
    for method, measured in rows["steps"]["resnet18/bf16/2"].items():
        assert measured["milliseconds"] > 0, (method, measured)
        assert (method == "batch") == ("over batch" not in measured)
    assert set(rows["accumulation"]) == {"resnet18/4/4", "resnet18/4/2"}
    assert {"SGDG", "AdamG", "torch SGD foreach"} <= rows["optimizers"]["resnet20"].keys()
    assert {key.split("/")[0] for key in rows["training"]} == {"batch", "group+ws"}
    assert all(0 <= row["accuracy"] <= 1 for row in rows["training"].values())

    before = {name: (tmp_path / f"{name}.json").read_text() for name in ("steps", "training")}
    assert gpu(*command, "--pieces", "steps", "training").returncode == 0
    assert before == {name: (tmp_path / f"{name}.json").read_text() for name in before}
