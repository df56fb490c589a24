"""Data sets in, batches out."""

from normkit.study.data.dataset import Data, Split, make_data
from normkit.study.data.load import load_data

__all__ = ["Data", "Split", "load_data", "make_data"]
