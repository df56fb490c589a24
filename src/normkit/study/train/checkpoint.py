"""Checkpoints of a trial on disk: written atomically, checked when read, and of use to their own trial alone."""

import contextlib
import hashlib
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from normkit.study.files import write_file

logger = logging.getLogger(__name__)

FORMAT = 2  # of the file: a change makes old checkpoints count as absent
_DIGEST = 32  # bytes of SHA-256 in front of the content
RELATIVE, ABSOLUTE = 1e-2, 1e-4  # decoders, processors and versions differ by less


def alike(kept: Any, found: Any) -> bool:
    """Return whether two fingerprints are of the same data and model, up to how machines differ.

    Examples:
        >>> alike({"means": [0.5, 1.0]}, {"means": [0.501, 1.0]}), alike({"means": [0.5]}, {"means": [0.6]})
        (True, False)
    """
    if isinstance(kept, dict) and isinstance(found, dict):
        return kept.keys() == found.keys() and all(alike(kept[key], found[key]) for key in kept)
    if isinstance(kept, list) and isinstance(found, list):
        return len(kept) == len(found) and all(map(alike, kept, found))
    if isinstance(kept, float) and isinstance(found, float):
        return math.isclose(kept, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (math.isnan(kept) and math.isnan(found))
    return kept == found


class CheckpointFile:
    """One trial's checkpoint, ``NAME.ckpt``.

    Args:
        folder: Where the file is; made when first needed.
        name: File name without its ending.
        run: Which run it is, JSON-ready; a file of another run counts as absent.
        fingerprint: Fingerprint of its data and model, JSON-ready; a file with one that is not alike counts as absent.
        writes: Whether this process keeps the file; of several ranks only one does.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        run: Any = None,
        fingerprint: Any = None,
        *,
        writes: bool = True,
    ) -> None:
        self.run = json.dumps([FORMAT, run], sort_keys=True)
        self.fingerprint = json.dumps(fingerprint)
        self.writes = writes
        self.path = folder / f"{name}.ckpt"
        self._warned = False

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state``; a process killed at any moment leaves the last complete checkpoint.

        Where it cannot be written, on a full disk for example, the run continues with the one before, and says so once.
        """
        if not self.writes:
            return
        buffer = io.BytesIO()
        torch.save({"run": self.run, "fingerprint": self.fingerprint, "state": state}, buffer)
        content = buffer.getvalue()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, hashlib.sha256(content).digest() + content)
        except OSError as error:
            if not self._warned:
                logger.warning("no checkpoint %s (%s): if it is interrupted, this run starts anew", self.path, error)
            self._warned = True

    def load(self) -> dict[str, Any] | None:
        """Read the state into main memory, or return None.

        What is damaged, no file, of another format or of another run counts as absent, and the trial starts anew.
        """
        if not self.path.is_file():  # reading a pipe would wait for its writer
            return None
        try:
            raw = self.path.read_bytes()
            if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
                return None
            content = torch.load(io.BytesIO(raw[_DIGEST:]), map_location="cpu", weights_only=True)
            run, fingerprint, state = content["run"], json.loads(content["fingerprint"]), content["state"]
        except Exception:  # torch raises many kinds for a file that is none of its own
            return None
        if run != self.run or not alike(fingerprint, json.loads(self.fingerprint)):
            logger.warning("%s is of another run, data or model: this run starts anew", self.path)
            return None
        return state if isinstance(state, dict) else None

    def remove(self) -> None:
        """Delete the file, and partial files that kills have left, once the trial has ended."""
        if self.writes:
            with contextlib.suppress(OSError):
                for path in (self.path, *self.path.parent.glob(f".{self.path.name}.*.part")):
                    path.unlink(missing_ok=True)
