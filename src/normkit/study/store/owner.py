"""Who works on a trial: a process, named so that no other process ever has its name.

Two containers may share a host name, a process number is given again, and after a restart all numbers are: a name is the host,
its boot, the PID namespace, the process number and the process's start time.
"""

import os
import socket
import uuid
from functools import cache
from pathlib import Path


def owner(pid: int | None = None) -> str:
    """The name of a process of this host (default: this one).

    Args:
        pid: Its number in this process's namespace.

    Returns:
        Host, boot, namespace, number and start time, separated by ``|``.
    """
    number = pid or os.getpid()
    return f"{_place()}|{number}|{_start_time(number) or ''}"


def alive(holder: str) -> bool:
    """Return False if ``holder`` is a process of this place that does not run any more.

    A process of another host, boot or namespace cannot be asked: its heartbeat tells.

    Args:
        holder: What ``owner`` returned, anywhere.

    Examples:
        >>> alive(owner()), alive("another-host|boot|pid:[1]|17|5")
        (True, True)
    """
    place, _, process = holder.rpartition("|")[0].rpartition("|")
    started = holder.rpartition("|")[2]
    if place != _place() or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return not started or _start_time(int(process)) in (None, started)


@cache
def _place() -> str:
    """Where process numbers mean the same processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot, namespace = f"{uuid.getnode():x}", ""
    return f"{socket.gethostname()}|{boot}|{namespace}"


def _start_time(pid: int) -> str | None:
    """Start of a process in clock ticks since the boot, or None where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
