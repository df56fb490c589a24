"""How many channels should a group have? `cnn4` with group normalizations of one size; one study for each size.

    normkit compare --data PATH/TO/cifar10 --flip --channels-last --model benchmarks/studies/group_sizes.py:groups_of_1
        --methods group,group+ws,group+bnp --batch-sizes 8 --budget 20000 --seeds 3 --out runs/groups-of-1

Likewise `groups_of_4` (what `normkit.convert` gives these layers of 24 to 96 channels), `groups_of_12` and `two_groups`.
"""

from collections.abc import Callable

from torch import nn

import normkit
from normkit.study.models import build_model


def groups_of_1(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Each channel is a group: instance normalization."""
    return _grouped(input_shape, classes, lambda channels: channels)


def groups_of_4(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Four channels in each group."""
    return _grouped(input_shape, classes, lambda channels: channels // 4)


def groups_of_12(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Twelve channels in each group."""
    return _grouped(input_shape, classes, lambda channels: channels // 12)


def two_groups(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two groups in each layer, of 12 to 48 channels."""
    return _grouped(input_shape, classes, lambda channels: 2)


def _grouped(input_shape: tuple[int, ...], classes: int, count: Callable[[int], int]) -> nn.Module:
    model = normkit.convert(build_model("cnn4", input_shape=input_shape, classes=classes), "group")
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = count(layer.num_channels)
    return model
