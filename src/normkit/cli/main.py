"""The command line: parse, call, print. Nothing is decided here."""

import contextlib
import io
import os
import sys
import traceback
from typing import Any

try:
    import tyro
except ImportError as missing:
    raise SystemExit(f"error: {missing}; the command line needs an extra: pip install 'normkit[study]'") from missing

from tyro.conf import FlagCreatePairsOff

from normkit import __version__
from normkit.cli.instruments import Doctor, Landscape, ReproduceHowBNHelps
from normkit.cli.reproduce import Reproduce
from normkit.cli.study import THOROUGH, Compare, Recipes, Report, Worker

COMMANDS: dict[str, Any] = {
    "compare": Compare,
    "worker": Worker,
    "reproduce": Reproduce,
    "report": Report,
    "recipes": Recipes,
    "landscape": Landscape,
    "doctor": Doctor,
    "reproduce how-bn-helps": ReproduceHowBNHelps,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command ``normkit``; returns the exit code (2 for bad input).

    Raises:
        OSError: Where it does not say what is wrong, or with ``--debug``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that a terminal does not have must not end a study
    try:
        command = _parse(arguments)
        return command.run(arguments)
    except ValueError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _complain(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `normkit recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be made, a full disk
        if "--debug" in arguments or error.strerror is None:
            raise
        return _complain(f"{error.filename or 'a file'}: {error.strerror}")


def _complain(what: object) -> int:
    print("error:", *str(what).split(), file=sys.stderr)  # a line, also where a user's exception has several
    return 2


def _parse(arguments: list[str]) -> Any:
    """The command that was asked for; tyro's framed message about bad input becomes one line.

    Raises:
        ValueError: There is no such command, or its arguments are wrong.
        SystemExit: Help was asked for, and printed.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if rest and f"{name} {rest[0]}" in COMMANDS:  # this preset is a command of its own
        name, rest = f"{name} {rest[0]}", rest[1:]
    described = {command: (kind.__doc__ or "").strip() for command, kind in COMMANDS.items()}
    if name in ("-h", "--help"):
        print("usage: normkit COMMAND [OPTIONS]; `normkit COMMAND --help` lists the options\n")
        print("\n".join(f"  {command:<22} {text}" for command, text in described.items()))
        sys.exit(0 if arguments else 2)
    if name == "--version":
        print(f"normkit {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        from normkit._errors import nearest

        raise ValueError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    default: dict[str, Any] = {"default": THOROUGH} if name == "compare" and "--thorough" in rest else {}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(COMMANDS[name], prog=f"normkit {name}", args=rest, config=(FlagCreatePairsOff,), **default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_one_line(said.getvalue())} (see normkit {name} --help)") from None


def _one_line(framed: str) -> str:
    """The first two paragraphs of tyro's message, without its frame: what is wrong, and what was perhaps meant."""
    lines = [line.strip("│╭╮╰╯|+ ") for line in framed.splitlines()]  # of ASCII where the terminal has no more
    paragraphs = " ".join("\n" if set(line) <= {"─", "-"} else line for line in lines[1:]).split("\n")
    kept = [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]
    line = "; ".join(kept[: 2 if "meant" in framed else 1])
    return line.replace("invalid literal for int() with base 10:", "give a whole number, not")


if __name__ == "__main__":
    sys.exit(main())
