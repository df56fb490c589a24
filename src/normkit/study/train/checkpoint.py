"""Checkpoints of a trial on disk: written atomically, checked when read, the one before kept in reserve."""

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

_DIGEST = 32  # bytes of SHA-256 in front of the content


class CheckpointFile:
    """Two generations of one trial's checkpoint: ``NAME.ckpt`` and the one before, ``NAME.previous.ckpt``.

    Args:
        folder: Where the files are; made when first needed.
        name: File name without its ending.
        writes: Whether this process keeps the files; of several ranks only one does.
    """

    def __init__(self, folder: Path, name: str, *, writes: bool = True) -> None:
        self.writes = writes
        self.latest = folder / f"{name}.ckpt"
        self.previous = folder / f"{name}.previous.ckpt"

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state``; a process killed at any moment leaves the last complete checkpoint readable.

        Where it cannot be written, on a full disk for example, the run goes on with the one before.
        """
        if self.writes:
            with contextlib.suppress(OSError):
                self._write(state)

    def _write(self, state: dict[str, Any]) -> None:
        self.latest.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        part = self.latest.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if self.latest.exists():
                self.latest.replace(self.previous)
            part.replace(self.latest)
        finally:
            part.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, in main memory, or None: a damaged file counts as absent."""
        for path in (self.latest, self.previous):
            try:
                raw = path.read_bytes()
            except OSError:
                continue
            if hashlib.sha256(raw[_DIGEST:]).digest() == raw[:_DIGEST]:
                return torch.load(io.BytesIO(raw[_DIGEST:]), map_location="cpu", weights_only=True)
        return None

    def remove(self) -> None:
        """Delete both generations: the trial has ended."""
        for path in (self.latest, self.previous) if self.writes else ():
            path.unlink(missing_ok=True)
