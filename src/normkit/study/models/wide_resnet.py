"""Wide residual networks (Zagoruyko, Komodakis, arXiv 1605.07146): normalization comes before the convolution."""

from torch import Tensor, nn

from normkit.study.models.layers import conv, he_initialize, pooled_classifier


class WideBlock(nn.Module):
    """Two times BatchNorm, ReLU, 3x3 convolution, with dropout between; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.relu1, self.relu2, self.dropout = nn.ReLU(), nn.ReLU(), nn.Dropout(dropout)
        self.shortcut = conv(inputs, width, 1, stride) if stride != 1 or inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(N, C, H, W)``."""
        active = self.relu1(self.norm1(x))
        out = self.dropout(self.relu2(self.norm2(self.conv1(active))))
        return self.conv2(out) + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(depth: int, factor: int, channels: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """WRN-``depth``-``factor``.

    Args:
        depth: Number of layers, ``6 n + 4``.
        factor: Widening factor of the widths 16, 32, 64.
        channels: Channels of the images.
        classes: Number of classes.
        dropout: Probability of dropping in the blocks.

    Returns:
        The network, He-initialised.

    Raises:
        ValueError: The depth is not ``6 n + 4``.
    """
    if depth < 10 or (depth - 4) % 6 or factor < 1:
        raise ValueError(
            f"wrn-{depth}-{factor}: the depth of a wide ResNet is 6 n + 4 (10, 16, 22, 28, 34, 40 ...) "
            "and its factor at least 1; choose for example 'wrn-16-4' or 'wrn-28-10'"
        )
    layers: list[nn.Module] = [conv(channels, 16)]
    inputs = 16
    for stage, width in enumerate((16 * factor, 32 * factor, 64 * factor)):
        for index in range((depth - 4) // 6):
            layers.append(WideBlock(inputs, width, 2 if stage > 0 and index == 0 else 1, dropout))
            inputs = width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), *pooled_classifier(inputs, classes)]
    model = nn.Sequential(*layers)
    he_initialize(model)
    return model
