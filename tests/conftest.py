"""What must be set before the first test file is read."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; each with all of them would wait for the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("inner", max_examples=60, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)  # --hypothesis-profile=nightly
settings.load_profile("inner")
