"""Checkpoints of a trial on disk: written atomically, checked when read."""

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

_DIGEST = 32  # bytes of SHA-256 in front of the content


class CheckpointFile:
    """One trial's checkpoint, ``NAME.ckpt``.

    Args:
        folder: Where the file is; made when first needed.
        name: File name without its ending.
        writes: Whether this process keeps the file; of several ranks only one does.
    """

    def __init__(self, folder: Path, name: str, *, writes: bool = True) -> None:
        self.writes = writes
        self.path = folder / f"{name}.ckpt"

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state``; a process killed at any moment leaves the last complete checkpoint.

        Where it cannot be written, on a full disk for example, the run continues with the one before.
        """
        if self.writes:
            with contextlib.suppress(OSError):
                self._write(state)

    def _write(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Read the state into main memory, or return None: a damaged file counts as absent, and the trial starts anew."""
        try:
            raw = self.path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
            return None
        return torch.load(io.BytesIO(raw[_DIGEST:]), map_location="cpu", weights_only=True)

    def remove(self) -> None:
        """Delete the file: the trial has ended."""
        if self.writes:
            self.path.unlink(missing_ok=True)
