"""Carry out a recipe: the one place that converts a model, builds its optimizer, attaches a method, and undoes all of it.

The methods and their names stand in :mod:`normkit.methods.catalog`; nothing else knows them.
"""

import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normkit._errors import nearest
from normkit.inspection.norms import is_batchnorm
from normkit.inspection.references import snapshot
from normkit.methods.bnp.bnp import BNP
from normkit.methods.catalog import RECIPES, TARGETS
from normkit.methods.method import OPTIMIZERS, ParamGroups, Part, Recipe, Request, make_optimizer
from normkit.optim.effect import Effect
from normkit.optim.rates import watch_rates
from normkit.optim.step_hooks import StepHandle, attachments
from normkit.surgery._convert import Where, convert, select, undo_in_place
from normkit.surgery._describe import describe
from normkit.surgery.conversion_state import origin_of

_logger = logging.getLogger("normkit")

_CHOSEN = ("normalization layers", "convolutions")  # that ``where`` chooses


def recipes() -> dict[str, Recipe]:
    """Return all methods by name, in the order in which they are shown."""
    return dict(RECIPES)


def apply(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    batches: Iterable[Any] | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    optimizer: str | Callable[[ParamGroups], Optimizer] = "sgd",
    where: Where = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Optimizer]:
    """Make ``model`` use the method ``name`` and build its optimizer; the training loop does not change.

    When anything raises, the model is as before, also if it had been converted already; until the call returns its tensors are
    copied for that. One line of the log (logger ``normkit``, level INFO) tells how much of the model the method reaches, and a
    warning follows where that is less than half; ``normkit.describe(model, optimizer)`` shows all of it.

    Args:
        name: One of [`normkit.recipes`][].
        model: Any module; methods that convert layers do so in place (use the returned model).
        lr: Learning rate.
        batches: Batches for methods that start from data (``batchless*``, ``*+input``), and for ``group+ws`` on a model that
            does not trace.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay.
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``; methods with an optimizer of their own keep it. Or a class,
            or any callable, that makes an optimizer from parameter groups, which carry ``lr`` and ``weight_decay``:
            ``torch.optim.RMSprop``, ``lambda groups: Muon(groups, momentum=0.95)``. ``momentum`` is then not used.
        where: Which normalization layers to convert, as in [`normkit.convert`][]: a predicate ``(path, layer) -> bool``, or
            paths; default all.
        options: Settings of the method by name, such as ``{"max_change": 0.1}``; ``recipes()[name].options`` lists them.

    Returns:
        The model to train and the optimizer to step.

    Raises:
        ValueError: The method, the optimizer or an option is unknown, a number is negative or not finite, ``where`` or
            ``optimizer`` has no meaning for the method, or the method refuses the model.
    """
    recipe = _recipe(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"apply: model is {str(model)[:60]!r}, of type {type(model).__name__}; give an nn.Module")
    for argument, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if isinstance(value, bool) or not number or not 0 <= value < math.inf:
            raise ValueError(f"apply: {argument} is {value!r}; give a finite number that is not negative")
    if isinstance(where, Iterable) and not isinstance(where, str | nn.Module):
        where = list(where)
    _check_optimizer(recipe, optimizer)
    if where is not None and recipe.convert is None:
        raise ValueError(f"apply: where chooses layers to convert, and {name!r} converts none; leave it out")
    if not isinstance(options, Mapping | None):
        raise ValueError(f"apply: options is {options!r}; give a mapping from names to values")
    given = dict(options or {})
    for option in given:
        if option not in recipe.options:
            choice = nearest(option, recipe.options) if recipe.options else f"{name!r} has no options"
            raise ValueError(f"apply: {name!r} has no option {option!r}; {choice}")
    request = Request(lr, momentum, weight_decay, optimizer, batches, given)
    with _restored_on_error(model):
        model, made = _carry_out(recipe, model, request, where)
        watch_rates(made, name)
        _report(name, describe(model, made).effects, chosen=where is not None)
    return model, made


def _recipe(name: Any) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(name, str):
        raise ValueError(f"apply: the method is {str(name)[:60]!r}, of type {type(name).__name__}; give its name first")
    if name not in RECIPES:
        raise ValueError(f"unknown method {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]


def handle(optimizer: Optimizer) -> BNP | StepHandle:
    """Return what [`normkit.apply`][] attached to ``optimizer``.

    Args:
        optimizer: What ``apply`` returned, or what a method was attached to by hand.

    Returns:
        With preconditioning the [`normkit.BNP`][]: ``precondition_()`` before clipping, ``masked(mask)``, ``skipped``,
        ``remove()``. Else the handle, whose ``remove()`` takes the method off.

    Raises:
        ValueError: Nothing is attached to the optimizer.

    Examples:
        >>> model, optimizer = apply("bnp", nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 1)), lr=0.1)
        >>> handle(optimizer).skipped
        {'1': 'PReLU is not a linear or convolution layer'}
    """
    found = attachments(optimizer)
    if not found:
        raise ValueError(
            f"handle: no method is attached to this {type(optimizer).__name__}; bnp, batchless and normalizer-free attach to "
            "the optimizer that normkit.apply returns, the others change the model or bring an optimizer of their own"
        )
    return found[0].owner if isinstance(found[0].owner, BNP) else found[0]


def _report(name: str, effects: Iterable[Effect], *, chosen: bool) -> None:
    """Log what the method reaches, and warn where that is little, unless the user chose the layers."""
    _logger.info("%s: %s", name, "; ".join(map(str, effects)))
    for effect in effects:
        if effect.little and not (chosen and effect.unit in _CHOSEN):
            shown = [f"{path or 'the model'}: {reason}" for path, reason in effect.left.items()]
            more = (
                f"; and {len(shown) - 3} more (normkit.describe(model, optimizer) lists all)" if len(shown) > 3 else ""
            )
            warnings.warn(f"{name} does little here: {effect}; {'; '.join(shown[:3])}{more}", stacklevel=3)


def _say_what_is_lost(name: str, model: nn.Module, where: Where) -> None:
    """Log a warning where batch normalization that has been trained is about to be replaced by another function."""
    trained = [
        path or "the model"
        for path, layer in select(model, where).items()
        if is_batchnorm(layer)
        and isinstance(mean := getattr(layer, "running_mean", None), Tensor)
        and not (is_lazy(mean) or mean.is_meta)
        and bool(mean.any())
    ]
    if trained:
        _logger.warning(
            "%s: %d batch normalizations with trained statistics are replaced, and with them what the model computes (%s, ...); "
            "normkit.apply(%s, ...) starts from the same function",
            name,
            len(trained),
            trained[0],
            f"{name!r}, normkit.fold(model).train()" if RECIPES[name].without_layers else "'frozen', model",
        )


def _say_what_stays(name: str, model: nn.Module) -> None:
    """Log a warning where a recipe that converts nothing meets what was converted before."""
    converted = {path: origin.to for path, layer in model.named_modules() if (origin := origin_of(layer)) is not None}
    if converted:
        path, to = next(iter(converted.items()))
        _logger.warning(
            "%s: %d normalization layers stay as they were converted before (%s to %r, ...); call normkit.revert(model) first to "
            "have the model's own",
            name,
            len(converted),
            path or "the model",
            to,
        )


def _check_optimizer(recipe: Recipe, optimizer: Any) -> None:
    """Refuse what makes no optimizer for the recipe.

    Raises:
        ValueError: It is unknown, an instance, or the recipe brings its own.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; {nearest(optimizer, OPTIMIZERS)}")
    elif isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise ValueError(
            f"apply: optimizer is a {kind} that exists already, but a method may replace parameters; give the class, or "
            f"lambda groups: {kind}(groups, ...)"
        )
    elif not callable(optimizer):
        raise ValueError(
            f"apply: optimizer is {optimizer!r}; give one of {', '.join(OPTIMIZERS)}, a class or a callable"
        )
    elif recipe.own_optimizer:
        raise ValueError(f"apply: {recipe.name!r} brings its own optimizer; leave `optimizer` out")


def _carry_out(recipe: Recipe, model: nn.Module, request: Request, where: Where) -> tuple[nn.Module, Optimizer]:
    given = request.options
    undo_in_place(model.modules())
    if recipe.convert is None:
        _say_what_stays(recipe.name, model)
    else:
        if TARGETS[recipe.convert.does].another:
            _say_what_is_lost(recipe.name, model, where)
        model = convert(model, recipe.convert.does, where=where, **recipe.convert.settings(given))
    if recipe.prepare is not None:
        model = recipe.prepare.does(model, request.batches, **recipe.prepare.settings(given))
    own = recipe.optimizer
    if isinstance(own, str):
        own = RECIPES[own].optimizer
    if isinstance(own, Part):
        optimizer = own.does(request, model, **own.settings(given))
    else:
        optimizer = make_optimizer(request, model, typed=recipe.typed)
    if recipe.attach is not None:
        recipe.attach.does(model, optimizer, **recipe.attach.settings(given))
    return model, optimizer


@contextmanager
def _restored_on_error(model: nn.Module) -> Generator[None, None, None]:
    """Put back the attributes, the containers and the tensors of all modules of ``model`` if the body raises.

    Yields:
        Nothing.
    """
    modules = list(model.modules())
    origins = [origin.module for module in modules if (origin := origin_of(module)) is not None]
    modules += origins
    types = [(module, type(module)) for module in modules]
    put_back = [snapshot(module) for module in (model, *origins)]
    known = {
        id(t): t for module in modules for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    tensors = [
        (tensor, tensor.detach().clone(), tensor.requires_grad, tensor._version)
        for tensor in known.values()
        if not (is_lazy(tensor) or tensor.is_inference())
    ]
    try:
        yield
    except BaseException:
        for module, kind in types:
            module.__class__ = kind
        for restore in put_back:
            restore()
        for tensor, before, requires_grad, version in tensors:
            _restore(tensor, before, requires_grad, version)
        raise


@torch.no_grad()
def _restore(tensor: Tensor, before: Tensor, requires_grad: bool, version: int) -> None:
    if tensor._version != version:
        tensor.copy_(before)
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
