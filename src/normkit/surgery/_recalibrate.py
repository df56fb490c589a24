"""Statistics of the whole data for the weights as they are now."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.inspection.forward import Forward, check_batches, evaluating, layerwise, run_batch
from normkit.methods.batchless.layer import BatchlessNorm
from normkit.moments import Moments, Tally, empty, observe, reduce

Layer = _BatchNorm | BatchlessNorm


def recalibrate(model: nn.Module, batches: Iterable[Any], *, forward: Forward = run_batch) -> nn.Module:
    """Recompute the statistics of batch and batchless normalization layers at the current weights.

    All rows of all batches count equally, on all ranks of a process group together. With batch normalization alone that
    is one pass, in which every layer normalises by the batch as in training, with dropout and noise off. With batchless
    layers it is layer after layer, in the order of execution, so that each is fitted to what the already fitted ones
    before it produce; the batches are kept in memory for that.

    Args:
        model: A model with such layers; changed in place. Modes come back, also when a batch raises; the statistics
            are then the old ones.
        batches: Batches of training data, at least one per rank; for batch normalization of the size it trains with.
        forward: How to run the model on a batch; by default a mapping goes in as keyword arguments, of a tuple or list
            the first entry, anything else as it is.

    Returns:
        The model.

    Raises:
        ValueError: The model has no such layer, or there is no batch, or one tensor instead of batches.

    Examples:
        >>> import torch
        >>> norm = recalibrate(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean.item(), round(norm.running_var.item(), 4)
        (4.0, 6.6667)
    """
    layers: list[Layer] = [
        m
        for m in model.modules()
        if isinstance(m, BatchlessNorm) or (isinstance(m, _BatchNorm) and m.running_mean is not None)
    ]
    if not layers:
        raise ValueError(
            "recalibrate: the model has no batch normalization that tracks statistics and no batchless layer"
        )
    check_batches(batches, "recalibrate")
    with evaluating(model):
        if any(isinstance(layer, BatchlessNorm) for layer in layers):
            _layer_after_layer(model, layers, list(batches), forward)
        else:
            _in_one_pass(model, layers, batches, forward)
    return model


def _in_one_pass(model: nn.Module, layers: list[Layer], batches: Iterable[Any], forward: Forward) -> None:
    tallies = {layer: Tally() for layer in layers}

    def as_in_training(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        tallies[layer].add(observe(x, 1))
        if x.numel() == x.shape[1]:
            return None  # one value per channel is its own mean; the running statistics have to do
        return F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0, layer.eps)

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
    own = [tallies[layer].take() or _nothing(layer) for layer in layers]
    for layer, moments in zip(layers, reduce(own), strict=True):
        _set(layer, moments)


def _layer_after_layer(model: nn.Module, layers: list[Layer], batches: list[Any], forward: Forward) -> None:
    _require(len(batches))
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    old = [t.clone() for t in tensors]
    try:
        for layer, moments in layerwise(model, layers, batches, forward):
            _set(layer, reduce([moments])[0])
    except BaseException:
        for tensor, value in zip(tensors, old, strict=True):
            tensor.copy_(value)
        raise


def _require(batches: int) -> None:
    if batches == 0:
        raise ValueError(
            "recalibrate: batches is empty; give at least one batch of training data (a generator runs out)"
        )


def _nothing(layer: Layer) -> Moments:
    like = next(iter((*layer.buffers(), *layer.parameters())))
    return empty(layer.num_features, device=like.device)


def _set(layer: Layer, moments: Moments) -> None:
    """Write the statistics; a layer that no batch reached keeps its own."""
    if moments.count < 1:
        return
    if isinstance(layer, BatchlessNorm):
        layer.set_statistics(moments.mean, moments.variance)
    elif layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.m2 / (moments.count - 1).clamp(min=1))  # unbiased, as batch normalization's
