"""Who works on a trial: processes, as processes on other hosts can name them."""

import os
import socket
import uuid

_HOST = f"{socket.gethostname()}-{uuid.getnode():x}"


def owner(pid: int | None = None) -> str:
    """A process of this host (default: this one), as processes on other hosts can name it."""
    return f"{_HOST}:{pid or os.getpid()}"


def alive(holder: str) -> bool:
    """False if ``holder`` is a process of this host that does not run; others are judged by their heartbeat."""
    host, _, pid = holder.rpartition(":")
    if host != _HOST:
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
