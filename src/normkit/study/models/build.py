"""From a name to a network."""

import math
import re
from collections.abc import Callable

from torch import nn

from normkit._errors import closest
from normkit.study.factory import is_factory, load_factory
from normkit.study.models.cnn import batchless_cnn, cnn4, cnn5, digits_cnn
from normkit.study.models.huggingface import hugging_face
from normkit.study.models.layers import image_channels
from normkit.study.models.mlp import deep_linear, mlp, spiral_mlp
from normkit.study.models.resnet import resnet
from normkit.study.models.vgg import vgg, vgg_dense
from normkit.study.models.wide_resnet import wide_resnet

_FLAT: dict[str, Callable[[int, int], nn.Module]] = {"mlp": mlp, "dln": deep_linear, "spiral-mlp": spiral_mlp}
_WIDE = re.compile(r"wrn-(\d+)-(\d+)(?:-(0\.\d+))?")


def _image_models() -> dict[str, tuple[int, Callable[..., nn.Module]]]:
    """Name -> smallest height and width, and builder from (channels, height, width, classes)."""
    table: dict[str, tuple[int, Callable[..., nn.Module]]] = {
        "digits-cnn": (1, lambda c, h, w, k: digits_cnn(c, k)),
        "cnn4": (8, lambda c, h, w, k: cnn4(c, k)),
        "cnn5": (1, lambda c, h, w, k: cnn5(c, k)),
        "batchless-cnn": (8, lambda c, h, w, k: batchless_cnn(c, k, h, w)),
    }
    for depth in (13, 19):
        table[f"vgg{depth}"] = (17, lambda c, h, w, k, depth=depth: vgg(depth, c, k))
        table[f"vgg{depth}-dense"] = (17, lambda c, h, w, k, depth=depth: vgg_dense(depth, c, k))
        table[f"vgg{depth}-small"] = (17, lambda c, h, w, k, depth=depth: vgg(depth, c, k, divisor=4))
    for depth in (18, 20, 34, 50, 56, 110):
        table[f"resnet{depth}"] = (1, lambda c, h, w, k, depth=depth: resnet(depth, c, k))
    for depth in (18, 34, 50):
        table[f"resnet{depth}-imagenet"] = (32, lambda c, h, w, k, depth=depth: resnet(depth, c, k, large=True))
    return table


def model_names() -> list[str]:
    """Names that ``build_model`` takes; ``wrn-D-K`` and ``hf:NAME`` stand for families.

    Examples:
        >>> model_names()[:3]
        ['digits-cnn', 'cnn4', 'cnn5']
    """
    return [*_image_models(), *_FLAT, "wrn-D-K", "hf:NAME", "package.module:factory"]


def build_model(name: str, *, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a network with BatchNorm; its weights are drawn from torch's global random numbers.

    Args:
        name: One of ``model_names``; ``wrn-28-10`` is depth 28, factor 10, and ``wrn-28-10-0.3`` drops 30 % in its
            blocks; ``hf:resnet`` is transformers' ResNet from its default configuration. ``package.module:factory`` or
            ``path/to/file.py:factory`` is called as ``factory(input_shape, classes)`` and returns the module.
        input_shape: Shape of one input without the batch: ``(channels, height, width)`` or ``(features,)``.
        classes: Number of outputs.

    Returns:
        A module from ``(N, *input_shape)`` to ``(N, classes)``.

    Raises:
        ValueError: Unknown name, or an input shape or number of classes that the network cannot take.
    """
    if classes < 1 or not input_shape or min(input_shape) < 1:
        raise ValueError(
            f"model {name!r} needs at least one class and a positive input shape, got classes={classes} and "
            f"input_shape={tuple(input_shape)}"
        )
    if name in _FLAT:
        return _FLAT[name](math.prod(input_shape), classes)
    table = _image_models()
    wide = _WIDE.fullmatch(name)
    if name in table:
        smallest, build = table[name]
        channels = image_channels(name, input_shape, smallest)
        return build(channels, *input_shape[1:], classes)
    if wide:
        depth, factor, dropout = int(wide[1]), int(wide[2]), float(wide[3] or 0.0)
        return wide_resnet(depth, factor, image_channels(name, input_shape), classes, dropout)
    if name.startswith("hf:"):
        image_channels(name, input_shape)
        return hugging_face(name.removeprefix("hf:"), input_shape, classes)
    if is_factory(name):
        return _from_factory(name, input_shape, classes)
    near = closest(name, [*table, *_FLAT, "wrn-28-10", "wrn-16-4"], cutoff=0.0)
    raise ValueError(f"unknown model {name!r}; did you mean {near!r}? Choose one of {', '.join(model_names())}")


def _from_factory(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The user's own network.

    Raises:
        ValueError: The factory raised, or returned no module.
    """
    factory = load_factory(name, "model")
    try:
        model = factory(input_shape, classes)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"model {name!r}: the factory raised {type(error).__name__}: {error}; it is called as "
            f"factory({input_shape}, {classes})"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r}: the factory returned a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model
