"""Training batchless layers: collect their statistics before each optimizer step.

Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from evenkeel.methods.batchless import BatchlessNorm, batchless_layers
from evenkeel.methods.batchless_forecast import Forecaster, forecasters
from evenkeel.moments import Moments, Tally, empty, finite, reduce
from evenkeel.stepping import StepHandle, before_step

RATE = 0.05
MISFIT = 1.5  # mean square of n from which the gradients of a step shrink, for projected layers


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

    watchers = forecasters(model)

    @torch.no_grad()
    def prepare() -> None:
        collect(layers, watchers)
        restrain(optimizer, layers)
        for layer in natural:
            layer.step(rate)

    def finish() -> None:
        for watcher in watchers:
            watcher.after()
        for layer in plain:
            layer.mean.grad = layer.rho.grad = None

    def discard() -> None:
        for layer in layers:
            layer.discard()
        for watcher in watchers:
            watcher.tally.take()

    handle = before_step(optimizer, prepare, after=finish, discard=discard, owner="evenkeel.attach")

    def release() -> None:
        for layer in layers:
            layer.set_collected(False)
        for watcher in watchers:
            watcher.remove()

    return StepHandle([handle.remove, release])


@torch.no_grad()
def collect(layers: list[BatchlessNorm], watchers: list[Forecaster] | None = None) -> None:
    """Write every layer's gradient of the likelihood into ``mean.grad`` and ``rho.grad``; update the projections.

    Args:
        layers: The layers, in the same order on every rank.
        watchers: Forecasters of some of the layers, told the moments of their inputs.
    """
    watchers = watchers or []
    pending = [_taken(layer.tally, layer.num_features, layer.mean) for layer in layers]
    inputs = [_taken(w.tally, w.features, w.norm.mean) for w in watchers]
    controlled = [(i, layer.control) for i, layer in enumerate(layers) if layer.control is not None]
    products = [control.take(pending[i].count) for i, control in controlled]
    reduced = [finite(moments) for moments in reduce([*pending, *inputs, *products])]
    for watcher, moments in zip(watchers, reduced[len(layers) :], strict=False):
        watcher.before(moments)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    for (i, control), product in zip(controlled, reduced[len(layers) + len(inputs) :], strict=True):
        control.update(product, *layers[i].normalized_moments(reduced[i]), ranks)
    for layer, moments in zip(layers, reduced, strict=False):
        seen = moments.count > 0
        layer.mismatch = torch.where(seen, layer.normalized_moments(moments)[1].mean() - 1, 0) / 2
        d_mean, d_rho = layer.likelihood_gradients(moments)
        layer.mean.grad, layer.rho.grad = torch.where(seen, d_mean, 0), torch.where(seen, d_rho, 0)


def _taken(tally: Tally, features: int, like: Tensor) -> Moments:
    """What was counted since the last step, if need be nothing."""
    return tally.take() or empty(features, dtype=like.dtype, device=like.device)


@torch.no_grad()
def restrain(optimizer: Optimizer, layers: list[BatchlessNorm]) -> None:
    """Multiply all gradients by ``min(1, 1.5 / m2)``, m2 = E n^2 of the projected layer that is fitted worst.

    Batch normalization divides an inflated activation by its own standard deviation in the same step; here it passes
    on, grows from layer to layer and inflates the gradients. A step taken at a misfit therefore counts for less, until
    mu and sigma have caught up.

    Args:
        optimizer: Whose gradients.
        layers: Layers whose mismatch was measured in this step; those without projection do not matter.
    """
    misfits = [2 * layer.mismatch + 1 for layer in layers if layer.projected and layer.mismatch is not None]
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    grads = [p.grad for p in params if p.grad is not None]
    if misfits and grads:
        factor = (MISFIT / torch.stack([m.to(misfits[0].device) for m in misfits]).max()).clamp(max=1)
        for grad in grads:
            grad.mul_(factor.to(grad.device, grad.dtype))


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
