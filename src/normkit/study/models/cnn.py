"""Small convolutional networks: for digits, for CIFAR-10 on a CPU, and the CIFAR-10 network of the batchless paper."""

from torch import nn

from normkit.study.models.layers import conv_norm_relu, glorot_initialize, he_initialize, pooled_classifier


def digits_cnn(channels: int, classes: int) -> nn.Module:
    """Four 3x3 convolutions of 32, 32, 64, 64 channels for maps of about 8x8, two of them with stride 2."""
    model = nn.Sequential(
        *conv_norm_relu(channels, 32),
        *conv_norm_relu(32, 32, stride=2),
        *conv_norm_relu(32, 64),
        *conv_norm_relu(64, 64, stride=2),
        *pooled_classifier(64, classes),
    )
    he_initialize(model)
    return model


def cnn4(channels: int, classes: int) -> nn.Module:
    """Four 3x3 convolutions of 24, 48, 96, 96 channels for maps of about 32x32; 2x2 max pooling after the first three."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 24), (24, 48), (48, 96)):
        layers += [*conv_norm_relu(inputs, outputs), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, *conv_norm_relu(96, 96), *pooled_classifier(96, classes))
    he_initialize(model)
    return model


def cnn5(channels: int, classes: int) -> nn.Module:
    """Five 3x3 convolutions of 32, 32, 64, 64, 128 channels for maps of about 32x32, three of them with stride 2."""
    model = nn.Sequential(
        *conv_norm_relu(channels, 32),
        *conv_norm_relu(32, 32, stride=2),
        *conv_norm_relu(32, 64),
        *conv_norm_relu(64, 64, stride=2),
        *conv_norm_relu(64, 128, stride=2),
        *pooled_classifier(128, classes),
    )
    he_initialize(model)
    return model


def batchless_cnn(channels: int, classes: int, height: int, width: int) -> nn.Module:
    """CIFAR-10 network of Berger and Uc Cetina, arXiv 2212.14729: normalization after the activation.

    Three blocks of convolution (64 channels; 7x7, 5x5, 3x3), LeakyReLU, BatchNorm, dropout 0.25 and 2x2 pooling; then two
    dense layers of 50, each with LeakyReLU, BatchNorm and dropout 0.25, and one of ``classes``. LeakyReLU has slope 0.3, weights
    are Glorot's, and BatchNorm has eps 0.001 and momentum 0.01, the defaults of Keras.
    """
    eps, momentum = 1e-3, 0.01
    layers: list[nn.Module] = []
    for inputs, kernel in ((channels, 7), (64, 5), (64, 3)):
        layers += [
            nn.Conv2d(inputs, 64, kernel, padding=kernel // 2),
            nn.LeakyReLU(0.3),
            nn.BatchNorm2d(64, eps, momentum),
        ]
        layers += [nn.Dropout(0.25), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for inputs in (64 * (height // 8) * (width // 8), 50):
        layers += [nn.Linear(inputs, 50), nn.LeakyReLU(0.3), nn.BatchNorm1d(50, eps, momentum), nn.Dropout(0.25)]
    model = nn.Sequential(*layers, nn.Linear(50, classes))
    glorot_initialize(model)
    return model
