"""The environment of a study: versions, device, commit, and the command that repeats it."""

import contextlib
import importlib.metadata
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_plus

import torch

from normkit.methods.kernels.choice import kernels_on
from normkit.study.errors import StudyError

PACKAGES = ("normkit", "torch", "numpy", "scikit-learn", "datasets", "optuna", "scipy")


def environment(device: str) -> dict[str, str]:
    """Package versions, Python, system, device, kernels, and the git commit of the working directory if there is one."""
    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["device"] = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else _processor()
    found["kernels"] = kernels_on(device)
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit:
        found["commit"] = commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return found


def together(kept: dict[str, str] | None, found: dict[str, str]) -> dict[str, str]:
    """Merge the environments of a study that resumes elsewhere; where they differ, all values are kept.

    Examples:
        >>> together({"torch": "2.12", "device": "A"}, {"torch": "2.13", "device": "A"})
        {'torch': '2.12; 2.13', 'device': 'A'}
    """
    joined = dict(kept or {})
    for name, value in found.items():
        before = joined.get(name, "")
        if value not in before.split("; "):
            joined[name] = f"{before}; {value}" if before else value
    return joined


def texts(kept: dict[str, str]) -> dict[str, str]:
    """A kept environment; it raises where that is none.

    Examples:
        >>> texts({"ranks": 2})
        {'ranks': '2'}
    """
    return {str(name): str(value) for name, value in kept.items()}


def check_device(device: str) -> None:
    """Check that tensors can be made on a device.

    Raises:
        StudyError: They cannot.
    """
    try:
        torch.zeros(1, device=device).item()  # the meta device makes tensors without values
    except (RuntimeError, AssertionError) as error:
        raise StudyError(
            f"--device {device}: cannot be used here ({str(error).splitlines()[0]}); use --device cpu"
        ) from error


def command_line(arguments: Sequence[str]) -> str:
    """The command, quoted for a shell, without passwords in URLs.

    Examples:
        >>> command_line(["compare", "--storage", "postgresql://me:secret@host/db"])
        "normkit compare --storage 'postgresql://me:***@host/db'"
    """
    return shlex.join(["normkit", *(_redact_argument(argument) for argument in arguments)])


def redact(text: str, url: str | None = None) -> str:
    """``text`` without the secrets of a URL in it: its password, and every query value that is not known to be harmless.

    Args:
        text: Any text.
        url: The URL whose secrets ``text`` may repeat; default ``text`` itself.

    Examples:
        >>> redact("postgresql://me:secret@host/db?sslmode=require&sslpassword=x")
        'postgresql://me:***@host/db?sslmode=require&sslpassword=***'
        >>> redact("no password 'a%b'", "mysql://me:a%25b@host/db")
        "no password '***'"
    """
    source = url or text
    secrets = {found["secret"] for found in _USER.finditer(source)}
    secrets |= {found["secret"] for found in _QUERY.finditer(source) if found["key"].lower() not in HARMLESS}
    for secret in sorted({*secrets, *map(unquote_plus, secrets), *map(unquote, secrets)} - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


HARMLESS = {
    *("application_name", "charset", "check_same_thread", "client_encoding", "connect_timeout", "host", "mode", "port"),
    *("sslmode", "sslrootcert", "target_session_attrs", "timeout", "uri"),
}
_USER = re.compile(r"\w[\w+.-]*://[^\s/?#:@]*:(?P<secret>[^\s@]*)@")
_QUERY = re.compile(r"[?&;](?P<key>[\w.-]+)=(?P<secret>[^\s&;#]*)")


def _redact_argument(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={redact(value)}"
    return redact(argument)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
