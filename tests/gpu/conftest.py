"""The GPU tests run where ``-m gpu`` asks for them and there is a GPU; ``python benchmarks/gpu.py`` asks."""

import json
import os
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("NORMKIT_GPU_TESTS") == "cpu"  # the same tests on a CPU, to test the tests
REASON = "no CUDA device here; python benchmarks/gpu.py runs these tests on a machine that has one"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or REHEARSAL:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" in config.option.markexpr:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=REASON))
    else:
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)


def pytest_runtest_logreport(report):
    """One line per test in the file that benchmarks/gpu.py names, at once, as its time may end."""
    log = os.environ.get("NORMKIT_GPU_TESTS_LOG")
    if log and not os.environ.get("PYTEST_XDIST_WORKER") and (report.when == "call" or report.outcome != "passed"):
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome != "passed":
            row["message"] = str(report.longrepr)[-600:]
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def device():
    return "cpu" if REHEARSAL else "cuda"
