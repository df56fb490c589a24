"""What must be set before the first test file is read."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("inner", max_examples=60, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)  # --hypothesis-profile=nightly
settings.load_profile("inner")
