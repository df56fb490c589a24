"""Fully connected networks: the 3x100 MLP, the deep linear network, the spiral MLP."""

import itertools

from torch import nn

from normkit.study.models.layers import glorot_initialize


def mlp(features: int, classes: int) -> nn.Module:
    """Three hidden layers of 100 sigmoid units with BatchNorm before the sigmoid (arXiv 1502.03167, on MNIST)."""
    layers: list[nn.Module] = []
    for inputs in (features, 100, 100):
        layers += [nn.Linear(inputs, 100, bias=False), nn.BatchNorm1d(100), nn.Sigmoid()]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(100, classes))
    glorot_initialize(model)
    return model


def deep_linear(features: int, outputs: int) -> nn.Module:
    """The deep linear network of arXiv 1805.11604: 25 linear layers of width 10, BatchNorm after all but the last."""
    widths = [features, *[10] * 24, outputs]
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(10, outputs, bias=False))
    glorot_initialize(model)
    return model


def spiral_mlp(features: int, classes: int) -> nn.Module:
    """The network for the three-arm spiral of arXiv 2212.14729: dense 50, then 20 times dense 40.

    Each is followed by LeakyReLU (slope 0.3, the default of Keras) and BatchNorm; Glorot initialisation.
    """
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise([features, 50, *[40] * 20]):
        layers += [nn.Linear(inputs, width), nn.LeakyReLU(0.3), nn.BatchNorm1d(width)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(40, classes))
    glorot_initialize(model)
    return model
