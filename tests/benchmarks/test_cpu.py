"""The benchmark that remeasures the CPU figures runs from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_piece_of_the_cpu_figures_is_measured(tmp_path):
    command = [sys.executable, "benchmarks/cpu.py", "--quick", "--name", str(tmp_path / "cpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["result"]
    assert len(result) == 8
    assert all(piece["found"] for piece in result.values())
    memory = result["step and peak memory, ResNet-20"]["found"]["batch 1"]["memory relative to batch"]
    assert memory["bnp"] < 1, "a step of BNP needs no copy of the parameters"
