"""Recompute running statistics over the data, for the present weights."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normkit.inspection.forward import Forward, check_batches, evaluating, layerwise, run_batch
from normkit.inspection.norms import (
    adopt_statistics,
    can_adopt_statistics,
    features_of,
    normalize_by_batch,
    observe_input,
    running_tensors,
    statistics_of,
)
from normkit.moments import Moments, Tally, reduce

Paths: TypeAlias = dict[nn.Module, str]


def recalibrate(model: nn.Module, batches: Iterable[Any], *, forward: Forward = run_batch) -> nn.Module:
    """Recompute the running statistics of all normalization layers that have some, at the current weights.

    All rows of all batches count equally, on all ranks of a process group together. With layers that normalize by the batch
    (batch normalization, its relatives, l_p normalization) that is one pass, in which every layer normalizes by the
    batch as in training, with dropout and noise off; l_p means are averaged over the batches. With batchless
    layers it is layer after layer, in the order of execution, so that each is fitted to what the already fitted ones
    before it produce; the batches are kept in memory for that.

    Layers that are kept in eval mode inside a model in train mode are frozen: they keep their statistics, and the layers behind
    them see what they make of the batches. ``num_batches_tracked`` becomes at least the number of batches, so that a
    cumulative average (``momentum=None``) continues from these statistics.

    Args:
        model: A model with such layers; changed in place. Modes come back, also when a batch raises; the statistics
            are then the old ones.
        batches: Batches of training data, at least one per rank; for batch normalization of the size it trains with.
        forward: How to run the model on a batch; by default a mapping goes in as keyword arguments, of a tuple or list
            the first entry, anything else as it is.

    Returns:
        The model.

    Raises:
        ValueError: The model has no such layer, or all are frozen; there is no batch, or one tensor instead of batches; all
            that reached a layer was not finite. The statistics are then the old ones.

    Examples:
        >>> import torch
        >>> norm = recalibrate(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean.item(), round(norm.running_var.item(), 4)
        (4.0, 6.6667)
    """
    if batches is None:
        raise ValueError("recalibrate: batches is None; give at least one batch of training data")
    paths = {module: path for path, module in model.named_modules() if can_adopt_statistics(module)}
    if not paths:
        raise ValueError(
            "recalibrate: the model has no normalization layer with running statistics of all rows (an instance normalization's "
            "are those of its samples)"
        )
    paths = {layer: path for layer, path in paths.items() if layer.training or not model.training}
    if not paths:
        raise ValueError(
            "recalibrate: all normalization layers are in eval mode inside a model in train mode, which is how layers are "
            "frozen; call model.eval() first to recalibrate them"
        )
    check_batches(batches, "recalibrate")
    with evaluating(model):
        if any(statistics_of(layer) == "learned" for layer in paths):
            _layer_after_layer(model, paths, list(batches), forward)
        else:
            _in_one_pass(model, paths, batches, forward)
    return model


def _in_one_pass(model: nn.Module, layers: Paths, batches: Iterable[Any], forward: Forward) -> None:
    tallies = {layer: Tally() for layer in layers}

    def as_in_training(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        with torch.no_grad():
            tallies[layer].add(observe_input(layer, x))
        if x.numel() == x.shape[1]:
            return None  # one value per channel is its own mean; the running statistics have to do
        return normalize_by_batch(layer, x)

    hooks = [layer.register_forward_hook(as_in_training, with_kwargs=True) for layer in layers]
    seen = 0
    try:
        for batch in batches:
            forward(model, batch)
            seen += 1
    finally:
        for hook in hooks:
            hook.remove()
    _require(seen)
    own = [tallies[layer].take() for layer in layers]
    merged = reduce([moments or _nothing(layer) for layer, moments in zip(layers, own, strict=True)])
    for (layer, path), local, moments in zip(layers.items(), own, merged, strict=True):
        if local is not None:
            _require_finite(path, layer, moments)
    for layer, moments in zip(layers, merged, strict=True):
        _set(layer, moments, seen)


def _layer_after_layer(model: nn.Module, layers: Paths, batches: list[Any], forward: Forward) -> None:
    _require(len(batches))
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    old = [t.clone() for t in tensors]
    try:
        for layer, moments in layerwise(model, list(layers), batches, forward):
            merged = reduce([moments])[0]
            _require_finite(layers[layer], layer, merged)
            _set(layer, merged, len(batches))
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, old, strict=True):
                tensor.copy_(value)
        raise


def _require(batches: int) -> None:
    if batches == 0:
        raise ValueError(
            "recalibrate: batches is empty; give at least one batch of training data (a generator runs out)"
        )


def _nothing(layer: nn.Module) -> Moments:
    """The observation of no input."""
    like = next(iter((*layer.buffers(), *layer.parameters())))
    return observe_input(layer, like.new_empty(0, features_of(layer)))


def _require_finite(path: str, layer: nn.Module, moments: Moments) -> None:
    if moments.count < 1:
        raise ValueError(
            f"recalibrate: {path or 'the model'} ({type(layer).__name__}) saw no batch that is finite; check the inputs and the "
            "layers before it for overflow"
        )


def _set(layer: nn.Module, moments: Moments, batches: int) -> None:
    """Write the statistics of so many batches; a layer that no batch reached keeps its own."""
    if moments.count < 1:
        return
    adopt_statistics(layer, moments)
    counter = running_tensors(layer).get("num_batches_tracked")
    if counter is not None:
        counter.clamp_(min=batches)
