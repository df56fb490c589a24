"""The command line: parse, call, print."""

from normkit.cli.stop import stopped


def run() -> int:
    """Run the command ``normkit``: what the installed program calls. Ctrl-C during the imports is no traceback."""
    try:
        from normkit.cli.main import main

        return main()
    except KeyboardInterrupt as stop:
        return stopped(stop)
