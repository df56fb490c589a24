"""VGG for CIFAR: convolution, BatchNorm, ReLU; five poolings and one linear classifier."""

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
    layers: list[nn.Module] = []
    inputs = channels
    for width, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            layers += conv_norm_relu(inputs, width // divisor)
            inputs = width // divisor
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    model = nn.Sequential(*layers, *pooled_classifier(inputs, classes))
    he_initialize(model)
    return model
