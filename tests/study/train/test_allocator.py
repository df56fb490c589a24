"""A process that keeps freed memory does not ask the system for it again."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, torch
from normkit.study.train.allocator import keep_freed_memory
assert keep_freed_memory()
def step():
    [torch.ones(2**20) for _ in range(24)]  # 4 MiB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_kept():
    assert int(subprocess.run([sys.executable, "-c", _FAULTS], check=True, capture_output=True).stdout) < 100
