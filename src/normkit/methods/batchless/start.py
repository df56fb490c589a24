"""Starting batchless layers: mu and sigma from data.

Berger, Uc Cetina. "Batchless Normalization", arXiv 2212.14729: data-dependent initialization, layer after layer.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from normkit.inspection.forward import check_batches, evaluating, layerwise, run_batch
from normkit.methods.batchless.layer import batchless_layers


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: int = 512,
) -> nn.Module:
    """Set mu and sigma of every batchless layer from data, layer after layer as they run (arXiv 2212.14729).

    Layer by layer, so that each is fitted to what the already fitted layers before it really produce; the function of
    the model changes. Runs in eval mode without gradients and restores the modes.

    Args:
        model: A model with batchless layers; changed in place.
        batches: Batches the model understands; read until ``samples`` instances have been seen, a few hundred are
            enough.
        forward: How to run the model on a batch; by default a mapping goes in as keyword arguments, of a tuple or list
            the first entry, anything else as it is.
        samples: Number of instances to read, counted along the first dimension of a batch's first tensor.

    Returns:
        The model.

    Raises:
        ValueError: The model has no batchless layer, or there is no batch, or one tensor instead of batches.
    """
    forward = forward or run_batch
    layers = batchless_layers(model)
    if not layers:
        raise ValueError(
            "initialize: the model has no batchless layer; convert it first, e.g. normkit.convert(model, 'batchless')"
        )
    check_batches(batches, "initialize")
    few = _take(batches, samples)
    if not few:
        raise ValueError("initialize: batches is empty; give at least one batch of training data")
    with evaluating(model):
        for layer, moments in layerwise(model, layers, few, forward):
            layer.set_statistics(moments.mean, moments.variance)
    return model


def _take(batches: Iterable[Any], samples: int) -> list[Any]:
    few: list[Any] = []
    for batch in batches:
        few.append(batch)
        tensor = _first_tensor(batch)
        samples -= 1 if tensor is None else tensor.shape[0]
        if samples <= 0:
            break
    return few


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((t for t in map(_first_tensor, parts) if t is not None), None)
