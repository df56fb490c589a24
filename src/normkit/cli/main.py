"""The command line: parse, call, print. Nothing is decided here, and torch is loaded by what computes."""

import inspect
import io
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

try:
    import tyro
except ImportError as missing:
    raise SystemExit(f"error: {missing}; the command line needs an extra: pip install 'normkit[study]'") from missing

from tyro.conf import FlagCreatePairsOff
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from normkit import __version__
from normkit._errors import nearest
from normkit.cli.instruments import Doctor, Landscape, ReproduceHowBNHelps
from normkit.cli.recipes import Recipes
from normkit.cli.reproduce import Reproduce
from normkit.cli.stop import stoppable, stopped
from normkit.cli.study import THOROUGH, Compare, Report, Worker

LONGEST_ERROR = 299  # characters
GROUPS: dict[str, dict[str, Any]] = {
    "Compare": {"compare": Compare, "report": Report, "worker": Worker, "recipes": Recipes},
    "Understand": {"doctor": Doctor, "landscape": Landscape},
    "Papers": {"reproduce": Reproduce, "reproduce how-bn-helps": ReproduceHowBNHelps},
}
COMMANDS: dict[str, Any] = {name: kind for group in GROUPS.values() for name, kind in group.items()}
WIDTH = 80  # columns of the terminal that help is set for


def main(arguments: list[str] | None = None) -> int:
    """Run the command ``normkit`` and return its exit code (2 for bad input).

    Raises:
        OSError: The error does not say by itself what is wrong, or ``--debug`` is given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that a terminal does not have must not end a study
    try:
        command = parse([argument for argument in arguments if argument != "--debug"])
        level = logging.WARNING if getattr(command, "quiet", False) else logging.INFO
        with _log_to_terminal(level), stoppable():
            return _run(command, arguments)
    except ValueError as error:
        if debug:
            traceback.print_exc()
        return _print_error(error)
    except KeyboardInterrupt as stop:
        return stopped(stop)
    except BrokenPipeError:  # the reader of our output has gone: `normkit recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be made, a full disk
        if debug or error.strerror is None:
            raise
        return _print_error(f"{error.filename or 'a file'}: {error.strerror}")


def _run(command: Any, arguments: list[str]) -> int:
    """Run a command; a model or data file of the user's that ends the program does not choose the exit code.

    Raises:
        ValueError: It ended the program.
    """
    try:
        return command.run(arguments)
    except SystemExit as error:
        raise ValueError(
            f"code that the command called ended the program (SystemExit: {error.code}); a model or data file must not call "
            "sys.exit or parse the command line"
        ) from error


def _print_error(error: object) -> int:
    text = " ".join(["error:", *str(error).split()])  # one line, also where a user's exception has several
    if len(text) > LONGEST_ERROR:  # what is wrong stands in front, the remedy at the end
        text = f"{text[: LONGEST_ERROR - 145]} ... {text[-140:]}"
    print(text, file=sys.stderr)
    return 2


class _Terminal(logging.Handler):
    """Prints to standard error as it is at that moment: a live display catches it and stays below the text."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _no_per_trial(record: logging.LogRecord) -> bool:
    """Whether a record is shown: what ``apply`` and ``convert`` did to a model would be told for every trial."""
    return record.levelno > logging.INFO or record.name != "normkit"


@contextmanager
def _log_to_terminal(level: int) -> Generator[None, None, None]:
    """Print what the package logs from ``level`` on, within the block."""
    logger, handler = logging.getLogger("normkit"), _Terminal()
    handler.addFilter(_no_per_trial)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def parse(arguments: list[str]) -> Any:
    """Return the command that was asked for.

    Raises:
        ValueError: There is no such command.
        SystemExit: Help or the version was asked for and printed, or tyro has printed what is wrong with the arguments.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name == "help" and rest:  # `normkit help compare`
        name, rest = rest[0], [*rest[1:], "--help"]
    if rest and f"{name} {rest[0]}" in COMMANDS:  # this preset is a command of its own
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0 if arguments else 2)
    if name in ("-V", "--version"):
        print(f"normkit {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    default: dict[str, Any] = {"default": THOROUGH} if name == "compare" and "--thorough" in rest else {}
    return tyro.cli(
        COMMANDS[name],
        prog=f"normkit {name}",
        description=_description(COMMANDS[name]),
        args=rest,
        config=(FlagCreatePairsOff,),
        registry=REGISTRY,
        **default,
    )


def _help() -> str:
    """The commands in groups."""
    width = max(map(len, COMMANDS)) + 4
    lines = ["usage: normkit COMMAND [OPTIONS]"]
    for group, commands in GROUPS.items():
        lines += ["", group]
        for name, kind in commands.items():
            lines += textwrap.wrap(
                (inspect.getdoc(kind) or "").partition("\n")[0],
                WIDTH,
                initial_indent=f"  {name:<{width - 2}}",
                subsequent_indent=" " * width,
            )
    lines += ["", "`normkit help COMMAND` lists the options of a command, with examples."]
    return "\n".join([*lines, "-V, --version prints the version; --debug shows tracebacks.", "", *_examples(Compare)])


def _description(kind: Any) -> str:
    return "\n".join([inspect.getdoc(kind) or "", "", *_examples(kind)])


def _examples(kind: Any) -> list[str]:
    return ["Examples:", *(f"  {example}" for example in kind.examples)]


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _separated_by_commas(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """``tuple[int, ...]`` as 64,8,1."""
    if info.type_origin is not tuple:
        return None
    kind = get_args(info.type)[0]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()},...",
        instance_from_str=lambda texts: tuple(_number(kind, word) for word in _words(texts[0])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


@REGISTRY.primitive_rule
def _rates(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Learning rates: auto, a number, or METHOD=NUMBER for each method."""
    if dict[str, float] not in get_args(info.type):
        return None

    def read(texts: list[str]) -> Any:
        if texts[0] == "auto":
            return "auto"
        if "=" not in texts[0]:
            return _number(float, texts[0])
        pairs = (word.partition("=") for word in _words(texts[0]))
        return {name: _number(float, rate) for name, _, rate in pairs}

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="auto|RATE|METHOD=RATE,...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (float, dict, str)),
        str_from_instance=lambda value: [str(value)],
    )


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A value that may be left out: the option takes the value alone."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if len(kinds) != 1 or kinds[0] not in (str, int, float, Path) or type(None) not in get_args(info.type):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kinds[0].__name__.upper(),
        instance_from_str=lambda texts: _number(kinds[0], texts[0]),
        is_instance=lambda value: value is None or isinstance(value, kinds[0]),
        str_from_instance=lambda value: [str(value)],
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _number(kind: Any, word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a {'whole ' if kind is int else ''}number") from None


if __name__ == "__main__":
    sys.exit(main())
