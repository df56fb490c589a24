"""What comes after batch normalization: its successors for any PyTorch model, and the instruments that compare them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normkit._public import *  # noqa: F403
    from normkit._public import __all__ as __all__

__version__ = "0.2.0.dev0"

_OF_STUDIES = {"Task": "normkit.study.task", "compare": "normkit.study.result"}  # which need the extra `study`


def __getattr__(name: str) -> Any:
    """Import the public names with the first use of one, and the instruments with theirs.

    So the command line answers ``--help`` without torch, and training does not wait for the instruments.

    Raises:
        AttributeError: There is no such name.
    """
    if name in _OF_STUDIES:
        return getattr(import_module(_OF_STUDIES[name]), name)
    if name in ("instruments", "doctor"):
        loaded = import_module("normkit.instruments")
        return loaded if name == "instruments" else loaded.doctor
    if not name.startswith("_") or name == "__all__":
        public = import_module("normkit._public")
        if hasattr(public, name):
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
