"""End a command on SIGTERM and SIGHUP as on Ctrl-C: with one line, and 128 + the signal's number as exit code."""

import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal that asks the program to end.

    Args:
        number: Its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Generator[None, None, None]:
    """Raise ``Stopped`` where SIGTERM or SIGHUP arrives within the block; under ``nohup`` SIGHUP stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    here = threading.current_thread() is threading.main_thread()
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if here and hasattr(signal, name)]
    taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def stopped(stop: KeyboardInterrupt, remedy: str = "") -> int:
    """Print that a command was stopped, and return its exit code.

    Args:
        stop: What was raised.
        remedy: How to resume.
    """
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    by = f" by {signal.Signals(number).name}" if isinstance(stop, Stopped) else ""
    print(f"\nstopped{by}{f'; {remedy}' if remedy else ''}", file=sys.stderr)
    return 128 + number
