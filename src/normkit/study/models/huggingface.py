"""Vision models of the transformers package, built from a configuration with fresh weights."""

import os
from typing import Any

from torch import Tensor, nn


class Logits(nn.Module):
    """A transformers model for image classification that takes a tensor and returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        return self.model(pixel_values=x).logits


def hugging_face(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a transformers model for image classification.

    Args:
        name: A model type (``resnet``, ``mobilenet_v2``, ``vit``: its default configuration), or a folder or hub name
            (with a slash) whose configuration is read; weights are always fresh.
        input_shape: ``(channels, height, width)``.
        classes: Number of classes.

    Returns:
        A module from images to logits.

    Raises:
        ValueError: transformers is not installed, or has no such vision model.
    """
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise ValueError(f"model 'hf:{name}' needs the transformers package: pip install transformers") from error
    wanted: dict[str, Any] = {"num_labels": classes, "num_channels": input_shape[0], "image_size": input_shape[1]}
    try:
        if os.path.isdir(name) or "/" in name:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(name)
        for key in [key for key in wanted if hasattr(config, key)]:
            setattr(config, key, wanted[key])
        return Logits(AutoModelForImageClassification.from_config(config, trust_remote_code=False))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model 'hf:{name}' cannot be built by transformers ({reason}); give a model type that classifies images, "
            "such as 'hf:resnet' or 'hf:mobilenet_v2', or a folder with a config.json"
        ) from error
