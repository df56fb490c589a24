"""Does preconditioning help beside weight standardization? `cnn4` with group normalizations behind standardized convolutions.

    normkit compare --data PATH/TO/cifar10 --flip --channels-last --model benchmarks/studies/standardized.py:standardized
        --methods group,group+bnp --batch-sizes 2 --budget 50000 --seeds 3 --out runs/standardized

`group` is here what `group+ws` is on `cnn4`, and `group+bnp` preconditions it as well: the gradient of the weights that are
standardized, with the statistics of their layer's inputs. Recipes do not combine the two, since BNP asks for weights that are
parameters.
"""

from typing import Any

from torch import Tensor, nn

import normkit
from normkit.methods.weight_standardization.standardize import standardize
from normkit.study.models import build_model


class Standardize:
    """Hooks that let a convolution compute with standardized filters, while its weight stays its own parameter."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.weight = layer.weight
        layer.register_forward_pre_hook(self.lend)
        layer.register_forward_hook(self.give_back, always_call=True)

    def lend(self, layer: nn.Module, _: Any) -> None:
        """Put the standardized filters in the place of the weight."""
        self.weight = layer._parameters["weight"]
        layer._parameters["weight"] = standardize(self.weight)  # pyright: ignore[reportArgumentType]

    def give_back(self, layer: nn.Module, *_: Tensor) -> None:
        """Put the weight in its place again."""
        layer._parameters["weight"] = self.weight


def standardized(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """`cnn4` with group normalizations and standardized convolutions."""
    model = normkit.convert(build_model("cnn4", input_shape=input_shape, classes=classes), "group")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            Standardize(layer)
    return model
