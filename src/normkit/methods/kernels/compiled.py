"""Compile C kernels for the CPU they run on, at their first use, with the machine's own C compiler.

As Triton does for GPUs: a kernel is a source beside the code that calls it, compiled in a fraction of a second, kept in
``$XDG_CACHE_HOME/normkit/kernels`` (``~/.cache/normkit/kernels``), and found there by every later process. Where there is no
compiler, the readable code runs.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_logger = logging.getLogger("normkit")

_TYPES = {torch.float32: "float", torch.float64: "double"}
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared")
_VECTORS = {  # what torch itself found that the processor has
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
_THREADS = ("-fopenmp", "-fopenmp-simd")  # Apple's compiler brings no threads
_ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


class Source:
    """A C source, whose ``REAL`` is the type of the tensors it works on.

    Args:
        path: The source.
        **signatures: Of each function the kinds of its arguments: ``p`` for the address of memory, ``i`` for an ``int64_t``,
            ``d`` for a ``double``.
    """

    def __init__(self, path: Path, **signatures: str) -> None:
        self.path, self.signatures = path, signatures
        self._libraries: dict[torch.dtype, ctypes.CDLL | None] = {}

    def compiled(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        """Return its functions for tensors of ``dtype``; None where there is no compiler, or no such kernel."""
        if dtype not in self._libraries:
            self._libraries[dtype] = self._load(dtype)
        return self._libraries[dtype]

    def _load(self, dtype: torch.dtype) -> ctypes.CDLL | None:
        compiler = _compiler()
        if dtype not in _TYPES or not compiler:
            return None
        try:
            library = _library(self.path, compiler, f"-DREAL={_TYPES[dtype]}")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            _logger.warning(
                "%s could not be compiled by %s (%s), so the slower readable code runs; set CC to another compiler, or "
                "NORMKIT_KERNELS=0 to use no kernels",
                self.path.name,
                shlex.join(compiler),
                said[0] if said else type(error).__name__,
            )
            return None
        for name, kinds in self.signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_ARGUMENTS[kind] for kind in kinds], None
        return library


def has_compiler() -> bool:
    """Return whether kernels can be compiled here."""
    return bool(_compiler())


@functools.cache
def _compiler() -> list[str]:
    """The command of the C compiler, empty where there is none."""
    if os.name == "nt":
        return []
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    _logger.info("there is no C compiler (cc), so the readable code runs instead of the kernels for CPUs")
    return []


def _library(source: Path, compiler: list[str], define: str) -> ctypes.CDLL:
    """Compile ``source``, or find it compiled."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*_FLAGS, define, *_VECTORS.get(capability, ())]
    key = hashlib.sha256(repr((source.read_text(), compiler, flags, platform.machine())).encode()).hexdigest()[:16]
    kept = _folder() / f"{source.parent.name}-{key}.so"
    with contextlib.suppress(OSError):  # not there, or no library
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        for threads in _THREADS:
            command = [*compiler, *flags, threads, str(source), "-o", str(made), "-lm"]
            last = threads == _THREADS[-1]
            if subprocess.run(command, check=last, capture_output=True, text=True, timeout=120).returncode == 0:
                break
        library = ctypes.CDLL(str(made))  # before it is kept, so that nothing is that does not load
        _keep(made, kept)
    return library


def _folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "normkit" / "kernels"


def _keep(made: Path, kept: Path) -> None:
    """Put a library where later processes find it, whole or not at all; a folder that cannot be written is no fault."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(made.read_bytes())
            os.fsync(file.fileno())  # a library that is cut short would end the process that loads it
        Path(file.name).replace(kept)
    except OSError as error:
        _logger.info("compiled kernels cannot be kept in %s (%s)", kept.parent, error)
