"""The command line as ``python -m normkit``."""

import sys

from normkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
