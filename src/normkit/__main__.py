"""The command line as ``python -m normkit``."""

import sys

from normkit.cli import run

if __name__ == "__main__":
    sys.exit(run())
