"""What must be set before the first test file is read."""

import os

import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
