"""Random changes of training images, in batch on the training device."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images.

    Attributes:
        flip: Mirror left and right with probability 1/2.
        crop: Pad by this many pixels, reflecting, and cut the original size out at a random place.
    """

    flip: bool = False
    crop: int = 0

    def __bool__(self) -> bool:
        return self.flip or self.crop > 0


def augment(images: Tensor, augmentation: Augmentation, draws: Tensor) -> Tensor:
    """Flip and crop each image of a batch by its own draws.

    Padding and cutting out is one gather: row ``r`` of the result is row ``reflect(r + offset - crop)`` of the image.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        augmentation: What to do.
        draws: Uniform numbers in [0, 1), ``(N, 3)``: vertical offset, horizontal offset, flip.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: The inputs are no images, or smaller than the padding.
    """
    if images.dim() != 4:
        raise ValueError(
            f"augmentation needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}; switch it off"
        )
    n, _, height, width = images.shape
    if augmentation.crop >= min(height, width):
        raise ValueError(
            f"crop {augmentation.crop} is too large for {height}x{width} images; choose less than their side"
        )
    device = images.device
    offsets = (draws[:, :2] * (2 * augmentation.crop + 1)).long() - augmentation.crop
    rows = _reflect(torch.arange(height) + offsets[:, :1], height)
    columns = _reflect(torch.arange(width) + offsets[:, 1:], width)
    if augmentation.flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    flat = (rows[:, :, None] * width + columns[:, None, :]).reshape(n, 1, -1).to(device, non_blocking=True)
    return images.flatten(2).gather(2, flat.expand(-1, images.shape[1], -1)).reshape(images.shape)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond the border mirrored at it, the border itself not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
