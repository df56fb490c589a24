"""Training batchless layers: collect their statistics before each optimizer step, and start them from data.

Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from evenkeel.methods.batchless import BatchlessNorm, batchless_layers
from evenkeel.moments import Tally, empty, observe, reduce
from evenkeel.stepping import StepHandle, before_step

RATE = 0.05


def attach(model: nn.Module, optimizer: Optimizer, *, rate: float = RATE) -> StepHandle:
    """Let ``optimizer.step()`` also fit mu and sigma of the batchless layers of ``model``.

    Right before each step, the moments that all layers counted since the last one are reduced over ranks in one
    collective and become the gradient of the likelihood. A layer with the ``natural`` gradient is stepped by plain SGD
    at ``rate``, independent of the optimizer's kind, momentum, weight decay and schedule. A layer with the ``plain``
    gradient trains like any other parameter, as in the paper: its mu and rho move to a parameter group of ``optimizer``
    without weight decay, so attach before building a learning-rate scheduler.

    Nothing is done to ``.grad`` of other parameters; clipping and loss scaling do not see the likelihood.

    Args:
        model: A model with batchless layers.
        optimizer: The optimizer that trains it; may hold all of ``model.parameters()``.
        rate: Learning rate of the natural gradient; mu is a running mean of weight ``rate``.

    Returns:
        A handle whose ``remove()`` detaches again.

    Raises:
        ValueError: The model has no batchless layer, or one that is attached already.
    """
    layers = batchless_layers(model)
    if not layers:
        raise ValueError(
            "attach: the model has no batchless layer; convert it first, e.g. evenkeel.convert(model, 'batchless')"
        )
    taken = next((name for name, m in model.named_modules() if isinstance(m, BatchlessNorm) and m.is_collected), None)
    if taken is not None:
        raise ValueError(
            f"attach: layer {taken!r} is attached already; call remove() of the handle of that attach() first"
        )
    natural = [layer for layer in layers if layer.gradient == "natural"]
    plain = [layer for layer in layers if layer.gradient == "plain"]
    for layer in layers:
        layer.set_collected(True)
    _move_to_own_group(optimizer, [p for layer in plain for p in (layer.mean, layer.rho)])

    @torch.no_grad()
    def prepare() -> None:
        collect(layers)
        for layer in natural:
            for p in (layer.mean, layer.rho):
                if p.grad is not None:
                    p.sub_(p.grad, alpha=rate)
                    p.grad = None  # the optimizer, which may hold p as well, has nothing left to do

    def forget() -> None:
        for layer in plain:
            layer.mean.grad = layer.rho.grad = None

    def discard() -> None:
        for layer in layers:
            layer.discard()

    handle = before_step(optimizer, prepare, after=forget, discard=discard, owner="evenkeel.attach")

    def release() -> None:
        for layer in layers:
            layer.set_collected(False)

    return StepHandle([handle.remove, release])


@torch.no_grad()
def collect(layers: list[BatchlessNorm]) -> None:
    """Write the gradient of the likelihood into ``mean.grad`` and ``rho.grad`` of every layer that observed something.

    Args:
        layers: The layers, in the same order on every rank.
    """
    pending = [
        layer.tally.take() or empty(layer.num_features, dtype=layer.mean.dtype, device=layer.mean.device)
        for layer in layers
    ]
    controlled = [(i, layer.control) for i, layer in enumerate(layers) if layer.control is not None]
    products = [control.take(pending[i].count) for i, control in controlled]
    reduced = reduce([*pending, *products])
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    for (i, control), product in zip(controlled, reduced[len(layers) :], strict=True):
        control.update(product, *layers[i].normalized_moments(reduced[i]), ranks)
    for layer, moments in zip(layers, reduced, strict=False):
        seen = moments.count > 0
        layer.mismatch = torch.where(seen, layer.normalized_moments(moments)[1].mean() - 1, 0) / 2
        d_mean, d_rho = layer.likelihood_gradients(moments)
        layer.mean.grad, layer.rho.grad = torch.where(seen, d_mean, 0), torch.where(seen, d_rho, 0)


def _move_to_own_group(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    """Take ``params`` out of the optimizer's groups and give them one of their own without weight decay."""
    if not params:
        return
    ours = {id(p) for p in params}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ours]
    group: dict[str, Any] = {"params": params}
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = 0.0
    optimizer.add_param_group(group)


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: int = 512,
) -> nn.Module:
    """Set mu and sigma of every batchless layer from data, layer after layer in the order of execution.

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
        ValueError: The model has no batchless layer, or there is no batch.
    """
    forward = forward or run_batch
    layers = batchless_layers(model)
    if not layers:
        raise ValueError(
            "initialize: the model has no batchless layer; convert it first, e.g. evenkeel.convert(model, 'batchless')"
        )
    few = _take(batches, samples)
    if not few:
        raise ValueError("initialize: batches is empty; give at least one batch of training data")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            order = _calls(model, layers, few[0], forward)
            for layer, calls in order.items():
                seen = Tally()
                for batch in few:
                    _observe_inputs(model, layer, calls, batch, forward, seen)
                moments = seen.take()
                if moments is not None:
                    layer.set_statistics(moments.mean, (moments.variance + layer.eps).sqrt())
    finally:
        for module, mode in modes:
            module.training = mode
    return model


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output: a mapping goes in as keyword arguments, of a tuple or list the first entry."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _Enough(Exception):
    """Leaves a forward pass once the layer of interest has been reached."""


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


def _calls(
    model: nn.Module, layers: list[BatchlessNorm], batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> dict[BatchlessNorm, int]:
    """How often each layer is called in one forward pass, in the order of the first call."""
    calls: dict[BatchlessNorm, int] = {}

    def count(layer: nn.Module, _: Any) -> None:
        assert isinstance(layer, BatchlessNorm)
        calls[layer] = calls.get(layer, 0) + 1

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _observe_inputs(
    model: nn.Module,
    layer: BatchlessNorm,
    calls: int,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    seen: Tally,
) -> None:
    """Count the moments of what reaches ``layer``; the pass ends with the layer's last call."""
    left = calls

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        seen.add(observe(args[0] if args else kwargs["x"], layer.feature_dim, mask))
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
