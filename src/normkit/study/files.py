"""Write files that a reader never sees half written."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, meets the former content or the new one, never a part.

    The content goes to a new file beside ``path``, is flushed to the disk, and then takes the place of ``path``.

    Args:
        path: The file; its folder must exist.
        content: Text, written as UTF-8 with its line ends as they are (what UTF-8 has not as ``?``), or bytes.

    Raises:
        OSError: It cannot be written; what was there is unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # of a killed process with this number
    try:
        with part.open("xb") as file:
            file.write(content.encode(errors="replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[None, None, None]:
    """Make a folder for the block; where the block raises, remove what was made and is still empty.

    Args:
        path: The folder; its parents are made too.

    Raises:
        OSError: It cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise
