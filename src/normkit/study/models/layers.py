"""What the networks of the study share: convolution with normalization, He initialisation, the classifier's head."""

import torch
from torch import nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the map's size at stride 1; no bias, as a normalization follows it."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution, BatchNorm, ReLU: the order of the batch normalization paper."""
    return [conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU()]


def pooled_classifier(features: int, classes: int) -> list[nn.Module]:
    """Global average pooling and a linear classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


@torch.no_grad()
def he_initialize(model: nn.Module) -> None:
    """He initialisation (fan-in, normal) of all convolutions; linear classifiers keep torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


@torch.no_grad()
def glorot_initialize(model: nn.Module) -> None:
    """Glorot initialisation (uniform) of all convolutions and linear layers; biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def image_channels(name: str, input_shape: tuple[int, ...], smallest: int = 1) -> int:
    """The number of channels of an image shape ``(channels, height, width)``.

    Args:
        name: The model's name, for the error.
        input_shape: Shape of one input.
        smallest: Smallest height and width that the network can take.

    Returns:
        ``input_shape[0]``.

    Raises:
        ValueError: The input is no image, or too small.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"model {name!r} takes images (channels, height, width), got input shape {tuple(input_shape)}; "
            "choose 'mlp' for flat features"
        )
    if min(input_shape[1:]) < smallest:
        raise ValueError(
            f"model {name!r} halves the map too often for input shape {tuple(input_shape)}: height and width must be "
            f"at least {smallest}; choose a shallower model such as 'digits-cnn' or 'resnet20'"
        )
    return input_shape[0]
