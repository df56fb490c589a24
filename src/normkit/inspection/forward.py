"""The statistics of what reaches each of a model's layers, one layer after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normkit.inspection.counting import no_counting
from normkit.moments import Moments, Tally, observe

Forward = Callable[[nn.Module, Any], Any]
_Layer = TypeVar("_Layer", bound=nn.Module)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output: a mapping goes in as keyword arguments, of a tuple or list the first entry."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def check_batches(batches: Any, caller: str) -> None:
    """Refuse one batch where an iterable of batches belongs: its rows would be taken for batches.

    Raises:
        ValueError: ``batches`` is a tensor.
    """
    if isinstance(batches, Tensor):
        raise ValueError(f"{caller}: batches is one tensor of shape {tuple(batches.shape)}; give several, or [batch]")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode, without gradients and without being observed; every module's mode comes back.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), no_counting():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def layerwise(
    model: nn.Module, layers: Sequence[_Layer], batches: Sequence[Any], forward: Forward = run_batch
) -> Iterator[tuple[_Layer, Moments]]:
    """Run ``model`` on all batches once per layer, in the order in which the first batch reaches the layers.

    Whoever takes a layer's moments can change the layer before the next one is looked at. Each run ends where the layer
    has had its last input.

    Args:
        model: The model, in the mode in which it is to run.
        layers: Layers of it; channels in dimension ``feature_dim`` of the layer, 1 where it has no such attribute. A
            second argument of theirs, or ``mask``, tells which rows count.
        batches: The batches.
        forward: How to run the model on a batch.

    Yields:
        A layer that was reached, and the moments of all rows of its input.
    """
    for layer, calls in _calls(model, layers, batches[0], forward).items():
        seen = Tally()
        for batch in batches:
            _observe_inputs(model, layer, calls, batch, forward, seen)
        moments = seen.take()
        if moments is not None:
            yield layer, moments


class _Enough(Exception):
    """Leaves a forward pass once the layer of interest has been reached."""


def _calls(model: nn.Module, layers: Sequence[_Layer], batch: Any, forward: Forward) -> dict[_Layer, int]:
    """How often each layer is called in one forward pass, in the order of the first call."""
    order: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda module, _: order.append(module)) for layer in layers]
    try:
        forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: order.count(layer) for layer in sorted(set(layers) & set(order), key=order.index)}


def _observe_inputs(model: nn.Module, layer: nn.Module, calls: int, batch: Any, forward: Forward, seen: Tally) -> None:
    """Count the moments of what reaches ``layer``; the pass ends with the layer's last call."""
    left = calls

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        x = args[0] if args else next(iter(kwargs.values()))
        seen.add(observe(x, getattr(layer, "feature_dim", 1), mask))
        left -= 1
        if left == 0:
            raise _Enough

    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        forward(model, batch)
    except _Enough:
        pass
    finally:
        hook.remove()
