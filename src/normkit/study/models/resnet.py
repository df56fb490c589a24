"""Residual networks: ResNet-20/56/110, and ResNet-18/34/50 with the stem for small images or the one for ImageNet."""

from torch import Tensor, nn
from torch.nn import functional as F

from normkit.study.models.layers import conv, he_initialize, pooled_classifier


class PadShortcut(nn.Module):
    """Shortcut without parameters: take every ``stride``-th position and fill the new channels with zeros."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Subsample ``(N, C, H, W)`` and append zero channels."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Shortcut by a 1x1 convolution and BatchNorm."""
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: ``relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))``."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(N, C, H, W)``."""
        out = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, the last with four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``(N, C, H, W)``."""
        out = self.relu1(self.norm1(self.conv1(x)))
        out = self.relu2(self.norm2(self.conv2(out)))
        return self.relu3(self.norm3(self.conv3(out)) + self.shortcut(x))


def _stages(
    block: type[BasicBlock | Bottleneck], widths: tuple[int, ...], depths: tuple[int, ...], project: bool
) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    inputs = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            outputs = width * block.expansion
            if stride == 1 and inputs == outputs:
                shortcut: nn.Module = nn.Identity()
            else:
                shortcut = projection(inputs, outputs, stride) if project else PadShortcut(stride, outputs - inputs)
            blocks.append(block(inputs, width, stride, shortcut))
            inputs = outputs
    return blocks


def _resnet(
    block: type[BasicBlock | Bottleneck],
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    project: bool,
    channels: int,
    classes: int,
    large: bool = False,
) -> nn.Module:
    first = conv(channels, widths[0], 7, 2) if large else conv(channels, widths[0])
    stem = [first, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    if large:
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    head = pooled_classifier(widths[-1] * block.expansion, classes)
    model = nn.Sequential(*stem, *_stages(block, widths, depths, project), *head)
    he_initialize(model)
    return model


_IMAGENET = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}


def resnet(depth: int, channels: int, classes: int, *, large: bool = False) -> nn.Module:
    """ResNet of He, Zhang, Ren, Sun (arXiv 1512.03385).

    Depths 20, 56, 110 have widths 16, 32, 64 and shortcuts without parameters, as in that paper's section on CIFAR-10;
    18, 34, 50 are its ImageNet networks with projection shortcuts, for small images with a 3x3 stem of stride 1 and no
    max-pooling, for ``large`` images with the paper's 7x7 stem of stride 2 and max-pooling.
    """
    if depth in _IMAGENET:
        block, depths = _IMAGENET[depth]
        return _resnet(block, (64, 128, 256, 512), depths, True, channels, classes, large)
    return _resnet(BasicBlock, (16, 32, 64), ((depth - 2) // 6,) * 3, False, channels, classes)
