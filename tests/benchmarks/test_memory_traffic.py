"""The counted traffic is that of the equations in docs/performance.md."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path.insert(0, "benchmarks")
from memory_traffic import normalized, traffic
a, p = normalized("digits-cnn", 32)
none = traffic("none", "digits-cnn", 32)[0]
for method in ("batch", "group", "batchless"):
    print(method, (traffic(method, "digits-cnn", 32)[0] - none) / a)
"""


@pytest.mark.slow
def test_normalizations_move_as_many_activations_as_their_passes_say():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    assert {method: round(float(count), 1) for method, count in found.items()} == {
        "batch": 8,
        "group": 8,
        "batchless": 9,
    }
