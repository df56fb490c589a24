"""What is measured on a model while it trains, one file per instrument.

Every instrument leaves weights, buffers, gradients, random states and train/eval flags as it found them, bit for bit,
also when the objective raises (see :mod:`evenkeel.instruments.guard`).
"""

from evenkeel.instruments._landscape import Landscape, landscape

__all__ = ["Landscape", "landscape"]
