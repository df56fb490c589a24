"""Start batchless layers from data, and fit them before each optimizer step.

Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.inspection.counting import Collector
from normkit.inspection.forward import check_batches, evaluating, layerwise, run_batch
from normkit.methods.batchless.fit import RATE, Fit, KernelFit, LikelihoodParameters, fit
from normkit.methods.batchless.layer import (
    ATTACH,
    BatchlessNorm,
    BatchlessNorm1d,
    BatchlessNorm2d,
    BatchlessNorm3d,
    batchless_layers,
)
from normkit.methods.batchless.weights import FeedingLayer, WeightProjection, feeding_layers
from normkit.methods.method import Method, Part, Recipe, adam, layer_target
from normkit.moments import Moments, reduce_together
from normkit.optim.effect import Effect
from normkit.optim.param_groups import check_optimizer
from normkit.optim.step_hooks import StepHandle, attach_to_step, check_attachable, effective_lr

_logger = logging.getLogger("normkit")

LARGEST_VARIANCE_RATIO = 1.5  # mean square of n from which the gradients of a step shrink, for projected layers


def attach(model: nn.Module, optimizer: Optimizer, *, rate: float = RATE) -> StepHandle:
    """Make ``optimizer.step()`` also fit mu and sigma of the batchless layers of ``model`` (arXiv 2212.14729).

    Right before each step, the moments that all layers counted since the last one are reduced over ranks in one
    collective and become the gradient of the likelihood. A layer with the ``natural`` gradient is stepped by plain SGD
    at ``rate N / (N + 6)`` for a step of N samples, independent of the optimizer's kind, momentum, weight decay and
    schedule. A layer with the ``plain`` gradient trains like any other parameter, as in the paper: its mu and log sigma
    get a parameter group of ``optimizer`` without weight decay, so attach before building a learning-rate scheduler.

    Clipping and loss scaling do not see the likelihood. The rows of a projected layer may be counted with the gradient of the
    weight in front of it: a step whose backward passes leave that weight out (``inputs=``) does not fit the layer, and warns.

    Args:
        model: A model with batchless layers.
        optimizer: The optimizer that trains it; may hold all of ``model.parameters()``.
        rate: Learning rate of the natural gradient for steps of many samples; mu is a running mean of that weight.

    Returns:
        A handle whose ``remove()`` detaches again.

    Raises:
        ValueError: The rate is out of range; the model has no batchless layer, one that is attached already, or sharded ones;
            the optimizer is another model's.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"attach: rate is {rate}; mu is a running mean of that weight, so give 0 to 1")
    layers = batchless_layers(model)
    if not layers:
        raise ValueError(
            "attach: the model has no batchless layer; convert it first, e.g. normkit.convert(model, 'batchless')"
        )
    check_attachable(optimizer, "batchless")
    if any(p.requires_grad for p in model.parameters()):
        check_optimizer(optimizer, model)
    taken = next((name for name, m in model.named_modules() if isinstance(m, BatchlessNorm) and m.is_collected), None)
    if taken is not None:
        raise ValueError(
            f"attach: layer {taken!r} is attached already; call remove() of the handle of that attach() first, or "
            "normkit.handle(optimizer).remove() where normkit.apply attached it"
        )
    if any(hasattr(layer.running_mean, "placements") for layer in layers):
        raise ValueError(
            "attach: the batchless layers are sharded over ranks (fully_shard), and mean and variance must be whole; use "
            "DistributedDataParallel"
        )
    fitter = _Fitter(model, layers, rate)
    handle = attach_to_step(
        optimizer,
        "batchless",
        fitter.before_step,
        after=fitter.after_step,
        discard=fitter.on_zero_grad,
        on_remove=fitter.release,
        owner=fitter,
    )
    try:
        _move_to_own_group(optimizer, fitter.parameters)
        fitter.start()
    except BaseException:
        handle.remove()
        raise
    return handle


def attach_behind_scheduler(model: nn.Module, optimizer: Optimizer, rate: float = RATE) -> StepHandle:
    """:func:`attach` in a trainer that has built its scheduler already, which knows the optimizer's groups.

    Raises:
        ValueError: As :func:`attach`; or a layer needs a group of its own.
    """
    plain = next(
        (name for name, m in model.named_modules() if isinstance(m, BatchlessNorm) and m.gradient == "plain"), None
    )
    if plain is not None:
        raise ValueError(
            f"{plain}: gradient='plain' trains mu and sigma in a group of the optimizer, which must be there before the "
            "scheduler; use gradient='natural', or call normkit.attach(model, optimizer) where both are built"
        )
    return attach(model, optimizer, rate=rate)


class _Fitter:
    """Fits mu and sigma of a model's batchless layers before each step of the optimizer that trains the model.

    Args:
        model: The model.
        layers: Its batchless layers.
        rate: Learning rate of the natural gradient.

    Attributes:
        constant: The layers whose bias the conversion froze: mu takes it out, and nothing bounds it.
        parameters: By name, what the optimizer trains with the plain gradient.
    """

    def __init__(self, model: nn.Module, layers: list[BatchlessNorm], rate: float) -> None:
        self.model, self.layers, self.rate = model, layers, rate
        self.collector = Collector("BatchlessNorm", ATTACH)
        self.plain = {layer: LikelihoodParameters(layer) for layer in layers if layer.gradient == "plain"}
        self.feeding: list[FeedingLayer] = []
        self.project_weights = WeightProjection()
        self.constant: list[Any] = []
        self.parameters: dict[str, nn.Parameter] = {}
        for path, module in model.named_modules():
            if isinstance(module, BatchlessNorm) and module in self.plain:
                own = self.plain[module].parameters()
                self.parameters[f"{path}.running_mean"], self.parameters[f"{path}.rho"] = own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.collector.claim()  # the rows of a model that was copied together with this

    def start(self) -> None:
        """Count from now on."""
        for layer in self.layers:
            layer.set_collector(self.collector)
        self.feeding = feeding_layers(self.model, self.collector)
        self.project_weights = WeightProjection(self.feeding)
        origins = [vars(layer).get("normkit_origin") for layer in self.layers]
        self.constant = [origin.frozen for origin in origins if origin is not None and origin.frozen is not None]

    def effects(self, model: nn.Module) -> list[Effect]:
        """Say which layers of ``model`` are fitted."""
        layers = {path: module for path, module in model.named_modules() if isinstance(module, BatchlessNorm)}
        own = set(self.layers)
        left = {path: "not attached" for path, layer in layers.items() if layer not in own}
        return [Effect("fitted", "batchless layers", tuple(path for path in layers if path not in left), left)]

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Fit, and write the gradients of what the optimizer trains with the plain gradient."""
        for layer in self.constant:  # ``model.requires_grad_(True)`` unfreezes them
            if layer.bias is not None:
                layer.bias.grad = None
        divisor = getattr(optimizer, "grad_scale", None)  # of a fused optimizer, which unscales gradients itself
        fits, lengths = collect(self.layers, self.project_weights)
        for found in fits:
            if found.layers[0].gradient == "natural":
                found.natural_gradient_step(self.rate)
            else:
                for layer, moments in zip(found.layers, found.moments, strict=True):
                    self.plain[layer].before(moments, 1.0 if divisor is None else divisor)
            for layer, ratio in zip(found.layers, found.variance_ratio, strict=True):
                layer.note_variance_ratio(ratio)
        clip_by_trust_ratio(optimizer, fits, self.feeding, lengths)

    def after_step(self, _: Optimizer) -> None:
        """Take over what the optimizer trained."""
        for own in self.plain.values():
            own.after()

    def on_zero_grad(self, _: Optimizer) -> None:
        """Forget the rows whose gradients were dropped."""
        for layer in self.layers:
            layer.counter.discard()
        for feeder in self.feeding:
            feeder.discard()

    def release(self, _: Optimizer) -> None:
        """Count no longer."""
        for layer in self.layers:
            layer.set_collector(None)
        for feeder in self.feeding:
            feeder.remove()


def collect(
    layers: list[BatchlessNorm], project_weights: WeightProjection | None = None
) -> tuple[list[Fit | KernelFit], dict[int, float]]:
    """Collect the rows of every layer over all ranks and project the weights' gradients.

    Args:
        layers: The layers, in the same order on every rank.
        project_weights: Projects the gradients of the weights in front of some of them.

    Returns:
        The fit of the layers, of those that are alike together; and what the projection returned.
    """
    project_weights = project_weights or WeightProjection()
    inputs = [feeder.take_sums() for feeder in project_weights.feeding]  # first: layers get rows from them
    rows = [layer.take() for layer in layers]
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        rows, inputs = _over_ranks(layers, rows, project_weights.feeding, inputs)
    lengths = project_weights(inputs, ranks)
    groups: dict[Any, list[tuple[BatchlessNorm, Moments, Tensor | float]]] = {}
    for layer, (moments, count) in zip(layers, rows, strict=True):
        mean: Any = layer._parameters["running_mean"]  # attributes of modules are found slowly
        kind = mean.device, mean.dtype, layer.eps, layer.gradient, layer.projected
        groups.setdefault(kind, []).append((layer, moments, count))
    return [fit(*(list(column) for column in zip(*group, strict=True))) for group in groups.values()], lengths


def _over_ranks(
    layers: list[BatchlessNorm],
    rows: Sequence[tuple[Moments, int]],
    feeding: Sequence[FeedingLayer],
    inputs: Sequence[tuple[int, Tensor, Tensor | None]],
) -> tuple[list[tuple[Moments, Tensor]], list[tuple[Tensor, Tensor, Tensor]]]:
    """What layers and feeding layers gave, of all ranks' rows, in one all-reduce."""
    sums = [layer.running_mean.new_full((), count) for layer, (_, count) in zip(layers, rows, strict=True)]
    for feeder, (count, of_features, along) in zip(feeding, inputs, strict=True):
        like = feeder.norm.running_mean.detach()
        sums += (like.new_full((), count), of_features, torch.zeros_like(like) if along is None else along)
    moments, sums = reduce_together([of_rows for of_rows, _ in rows], sums)
    remaining = iter(sums)
    counts = list(islice(remaining, len(layers)))
    found = [(next(remaining), next(remaining), next(remaining)) for _ in feeding]
    return list(zip(moments, counts, strict=True)), found


def clip_by_trust_ratio(
    optimizer: Optimizer,
    fits: Sequence[Fit | KernelFit],
    feeding: Sequence[FeedingLayer] = (),
    lengths: Mapping[int, float] | None = None,
) -> None:
    """Multiply all gradients by ``1 / max(1, m2 / 1.5, c)``: a step is shorter where mu and sigma could not follow it.

    - m2 = E n^2 of the projected layer that is fitted worst. Batch normalization divides an inflated activation by its own
      standard deviation in the same step; here it passes on, grows from layer to layer and inflates the gradients, until
      mu and sigma have caught up.
    - c, the largest ``lr / (1 - momentum) |g| / |w|`` of the weights before projected layers: no gradient moves a weight by
      more than its own length, which batch normalization would survive and lagging statistics do not.

    Args:
        optimizer: Whose gradients.
        fits: Of the layers in this step; those without projection do not matter.
        feeding: Layers that feed projected ones.
        lengths: By the ``id`` of a weight, ``|g| / |w|`` where it is known already.
    """
    excess = [found.largest_variance_ratio / LARGEST_VARIANCE_RATIO for found in fits if found.projected]
    if not excess:
        return
    known = lengths or {}
    others = {id(feeder.layer._parameters.get("weight")) for feeder in feeding}.difference(known)
    for group in optimizer.param_groups:
        found: list[Any] = [known[key] for key in map(id, group["params"]) if key in known]
        if others and (moved := [p for p in group["params"] if id(p) in others and p.grad is not None]):
            found.append(_largest_length(moved))
        if found:
            rate = effective_lr(optimizer, group)
            excess += [rate * length for length in found]
    factor = _shrinking(excess)
    if not isinstance(factor, Tensor) and factor == 1:
        return
    params = (p for group in optimizer.param_groups for p in group["params"])
    grads = [p.grad for p in params if p.requires_grad and p.grad is not None]
    for device in {grad.device for grad in grads}:
        of_device = factor.to(device) if isinstance(factor, Tensor) else factor
        torch._foreach_mul_([grad for grad in grads if grad.device == device], of_device)


def _largest_length(weights: list[Tensor]) -> Tensor:
    """Largest ratio of a gradient's length to its weight's; a weight of length 0 does not count."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    step, length = (
        torch.stack([norm.to(weights[0].device) for norm in torch._foreach_norm(tensors)])
        for tensors in (grads, weights)
    )
    return torch.where(length > 0, step / length, 0).max()


def _shrinking(excess: Sequence[Tensor | float]) -> Tensor | float:
    """What shortens a step by its largest excess over 1; a number where all of them are."""
    device = next((e.device for e in excess if isinstance(e, Tensor)), None)
    if device is None:
        largest = math.nan if any(map(math.isnan, excess)) else max(excess)  # nan where one is none, as torch has it
        return 1.0 if largest <= 1 else 1 / largest
    return 1 / torch.stack([torch.as_tensor(e, device=device) for e in excess]).max().clamp(min=1)


def _move_to_own_group(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> None:
    """Take ``params`` out of the optimizer's groups and give them one of their own with the same options.

    It has no weight decay, and is minimized: likelihoods have a sign of their own.
    """
    if not params:
        return
    ours = {id(p) for p in params.values()}
    held = (g for g in optimizer.param_groups if any(id(p) in ours for p in g["params"]))
    like = next(held, optimizer.param_groups[0])
    for group in optimizer.param_groups:
        keep = [i for i, p in enumerate(group["params"]) if id(p) not in ours]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in keep]
    named = any("param_names" in group for group in optimizer.param_groups)
    options = {name: value for name, value in like.items() if name not in ("params", "param_names")}
    off = {name: value for name, value in (("weight_decay", 0.0), ("maximize", False)) if name in options}
    group: dict[str, Any] = {"params": list(params.items() if named else params.values()), **options, **off}
    optimizer.add_param_group(group)


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    samples: int = 512,
    keep_function: bool = False,
) -> nn.Module:
    """Set mu and sigma of every batchless layer from data, layer after layer as they run (arXiv 2212.14729).

    Each layer is fitted to the outputs of the layers before it, which are fitted already. The function of the model changes,
    unless gamma and beta compensate (``keep_function``). Runs in eval mode without gradients and restores the modes.

    Args:
        model: A model with batchless layers; changed in place.
        batches: Batches that the model takes; read until ``samples`` samples have been seen, a few hundred are enough.
        forward: How to run the model on a batch; by default a mapping goes in as keyword arguments, of a tuple or list
            the first entry, anything else as it is.
        samples: Number of samples to read, counted along the first dimension of a batch's first tensor.
        keep_function: Whether gamma and beta change as well, so that the function stays the same: to fit mu and sigma anew
            in the course of training.

    Returns:
        The model.

    Raises:
        ValueError: The model has no batchless layer, or one without gamma and beta whose function is to be kept; or there is no
            batch, or one tensor instead of batches.
    """
    forward = forward or run_batch
    layers = batchless_layers(model)
    if not layers:
        raise ValueError(
            "initialize: the model has no batchless layer; convert it first, e.g. normkit.convert(model, 'batchless')"
        )
    if keep_function and any(not layer.affine for layer in layers):
        raise ValueError("initialize: keep_function=True needs gamma and beta in every batchless layer (affine=True)")
    check_batches(batches, "initialize")
    few = _take(batches, samples)
    if not few:
        raise ValueError("initialize: batches is empty; give at least one batch of training data")
    with evaluating(model):
        for layer, moments in layerwise(model, layers, few, forward):
            (layer.regauge if keep_function else layer.set_statistics)(moments.mean, moments.variance)
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


def start_from_data(model: nn.Module, batches: Iterable[Any] | None, *, samples: int = 512) -> nn.Module:
    """:func:`initialize` a converted model if there are batches and layers to initialize; say so where none have been seen."""
    layers = batchless_layers(model)
    if batches is not None and layers:
        initialize(model, batches, samples=samples)
    elif any(not (layer.running_mean.is_meta or layer.running_mean.any()) for layer in layers):
        _logger.warning(
            "batchless: mu and sigma start at 0 and 1, which is far from what layers see, and training starts slowly; give "
            "batches=, a few hundred samples of training data"
        )
    return model


def attach_where_needed(model: nn.Module, optimizer: Optimizer, **options: Any) -> None:
    """:func:`attach` a model that has batchless layers; a model without normalization layers needs nothing."""
    if batchless_layers(model):
        attach(model, optimizer, **options)


_PAPER = "Berger, Uc Cetina 2022, arXiv 2212.14729"
_GROUP = "Batchless normalization"
_LAYERS = (BatchlessNorm1d, BatchlessNorm2d, BatchlessNorm3d)
_OPTIONS = ("shared", "scale", "eps")

METHOD = Method(
    recipes=(
        Recipe(
            "batchless",
            "Mean and deviation learned, one sample at a time",
            _PAPER,
            0.03,
            convert=Part("batchless", *_OPTIONS, "gradient"),
            prepare=Part(start_from_data, "samples"),
            attach=Part(attach_where_needed, "rate"),
            group=_GROUP,
        ),
        Recipe(
            "batchless-adam",
            "Batchless, trained by Adam as in the paper",
            _PAPER,
            0.001,
            convert=Part("batchless", *_OPTIONS, gradient="plain"),
            prepare=Part(start_from_data, "samples"),
            optimizer=Part(adam),
            attach=Part(attach_where_needed),
            group=_GROUP,
            ablation=True,
        ),
        Recipe(
            "batchless-projected",
            "Batchless with the gradient projected as BatchNorm's",
            _PAPER + ", gradient ours",
            0.1,
            convert=Part("batchless-projected", *_OPTIONS, "gradient"),
            prepare=Part(start_from_data, "samples"),
            attach=Part(attach_where_needed, "rate"),
            lr_exponent=0.75,  # at batch sizes 16 and 1 the best of a grid was its lowest
            revision=2,
            group=_GROUP,
        ),
    ),
    targets={
        name: layer_target(_LAYERS, fixed={"projected": projected}, channels_last=True, freezes_bias=True)
        for name, projected in (("batchless", False), ("batchless-projected", True))
    },
)
