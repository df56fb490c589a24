"""VGG for CIFAR: convolution, BatchNorm, ReLU; five poolings; one linear classifier, or dense layers before it."""

import itertools

from torch import nn

from normkit.study.models.layers import conv_norm_relu, he_initialize, pooled_classifier

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {13: (2, 2, 2, 2, 2), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, channels: int, classes: int, divisor: int = 1) -> nn.Module:
    """VGG-13 or VGG-19 (Simonyan, Zisserman, arXiv 1409.1556), without its hidden dense layers.

    Args:
        depth: 13 or 19.
        channels: Channels of the images.
        classes: Number of outputs.
        divisor: Divides the width of every layer, for small machines.
    """
    layers = _convolutions(depth, channels, divisor)
    model = nn.Sequential(*layers, *pooled_classifier(_WIDTHS[-1] // divisor, classes))
    he_initialize(model)
    return model


def vgg_dense(depth: int, channels: int, classes: int) -> nn.Module:
    """VGG-13 or VGG-19 of Cho and Lee (arXiv 1709.09603): two dense layers of 512, and no BatchNorm has a scale.

    The dense layers are followed by BatchNorm and ReLU like the convolutions. The scale is there, but it is 1 and frozen, so that
    every normalization can take the layer's place.

    Args:
        depth: 13 or 19.
        channels: Channels of the images.
        classes: Number of outputs.
    """
    layers = [*_convolutions(depth, channels), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(2):
        dense = nn.Linear(512, 512, bias=False)
        nn.init.kaiming_normal_(dense.weight, nonlinearity="relu")
        layers += [dense, nn.BatchNorm1d(512), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, classes))
    he_initialize(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.requires_grad_(False)
    return model


def _convolutions(depth: int, channels: int, divisor: int = 1) -> list[nn.Module]:
    layers: list[nn.Module] = []
    widths = [channels, *(width // divisor for width in _WIDTHS)]
    for (inputs, width), count in zip(itertools.pairwise(widths), _CONVOLUTIONS[depth], strict=True):
        for index in range(count):
            layers += conv_norm_relu(width if index else inputs, width)
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return layers
