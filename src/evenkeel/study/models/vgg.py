"""VGG for CIFAR: convolution, BatchNorm, ReLU; five poolings and one linear classifier."""

from torch import nn

from evenkeel.study.models.layers import conv_norm_relu, he_initialize, pooled_classifier

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {13: (2, 2, 2, 2, 2), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, channels: int, classes: int) -> nn.Module:
    """VGG-13 or VGG-19 (Simonyan, Zisserman, arXiv 1409.1556), without its hidden dense layers."""
    layers: list[nn.Module] = []
    inputs = channels
    for width, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            layers += conv_norm_relu(inputs, width)
            inputs = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    model = nn.Sequential(*layers, *pooled_classifier(512, classes))
    he_initialize(model)
    return model
