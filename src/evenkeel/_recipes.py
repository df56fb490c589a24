"""The one list of methods: name -> (model, optimizer).

The study, the command line, the adapters and the docs read this list; nothing else knows a method's name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from evenkeel.surgery import convert


@dataclass(frozen=True)
class Request:
    """What the user asked :func:`apply` for; a recipe's ``build`` turns it into (model, optimizer).

    Attributes:
        model: The user's model, with or without normalization layers; converted in place where the method says so.
        lr: Learning rate.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay of the weights.
        batches: Batches for methods that start from data, or None.
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``, for methods that do not bring their own.
    """

    model: nn.Module
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    batches: Iterable[Any] | None = None
    optimizer: str = "sgd"


@dataclass(frozen=True)
class Recipe:
    """One method: what it is called, where it comes from, and how a model is made to use it.

    Attributes:
        name: The name on the command line.
        summary: One line that says what it does.
        paper: Authors, year, arXiv number.
        lr: Centre of the learning-rate grid in a study with this method, at batch size 64.
        build: Turns a request into (model, optimizer).
        lr_exponent: The centre moves with ``(batch_size / 64) ** lr_exponent``.
    """

    name: str
    summary: str
    paper: str
    lr: float
    build: Callable[[Request], tuple[nn.Module, Optimizer]]
    lr_exponent: float = 0.5


def sgd(request: Request, model: nn.Module) -> Optimizer:
    """The optimizer most recipes use: SGD, unless the request names another."""
    if request.optimizer == "adam":
        return adam(request, model)
    if request.optimizer == "adamw":
        return AdamW(model.parameters(), lr=request.lr, weight_decay=request.weight_decay)
    return SGD(
        model.parameters(),
        lr=request.lr,
        momentum=request.momentum,
        weight_decay=request.weight_decay,
        nesterov=request.optimizer == "nesterov",
    )


def adam(request: Request, model: nn.Module) -> Adam:
    """Adam with the usual betas; momentum is its own."""
    return Adam(model.parameters(), lr=request.lr, weight_decay=request.weight_decay)


def _batch(request: Request) -> tuple[nn.Module, Optimizer]:
    return request.model, sgd(request, request.model)


def _converted(to: str) -> Callable[[Request], tuple[nn.Module, Optimizer]]:
    def build(request: Request) -> tuple[nn.Module, Optimizer]:
        model = convert(request.model, to)
        return model, sgd(request, model)

    return build


_HELPS = "Santurkar et al. 2018, arXiv 1805.11604"

_RECIPES: tuple[Recipe, ...] = (
    Recipe("none", "Normalization layers removed, biases restored", "the baseline", 0.03, _converted("none")),
    Recipe("batch", "Batch normalization as the model has it", "Ioffe, Szegedy 2015, arXiv 1502.03167", 0.1, _batch),
    Recipe("group", "Group normalization", "Wu, He 2018, arXiv 1803.08494", 0.1, _converted("group")),
    Recipe(
        "layer",
        "Layer normalization over channels and space",
        "Ba et al. 2016, arXiv 1607.06450",
        0.1,
        _converted("layer"),
    ),
    Recipe("noisy-batch", "Batch normalization, then shifting noise: a probe", _HELPS, 0.1, _converted("noisy-batch")),
    Recipe("l1", "Normalization by the mean magnitude", _HELPS, 0.1, _converted("l1")),
    Recipe("l2", "Normalization by the root mean square", _HELPS, 0.1, _converted("l2")),
    Recipe("linf", "Normalization by the largest magnitude", _HELPS, 0.1, _converted("linf")),
)


_OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")


def recipes() -> dict[str, Recipe]:
    """All methods by name, in the order in which they are shown."""
    return {recipe.name: recipe for recipe in _RECIPES}


def apply(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    batches: Iterable[Any] | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    optimizer: str = "sgd",
) -> tuple[nn.Module, Optimizer]:
    """Make ``model`` use the method ``name`` and build its optimizer; the training loop does not change.

    Args:
        name: One of :func:`recipes`.
        model: Any module; methods that convert layers do so in place (use the returned model).
        lr: Learning rate.
        batches: Batches for methods that start from data.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay.
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``; methods with an optimizer of their own keep it.

    Returns:
        The model to train and the optimizer to step.

    Raises:
        ValueError: The method or the optimizer is unknown.
    """
    table = recipes()
    if name not in table:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(table)}")
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(_OPTIMIZERS)}")
    return table[name].build(Request(model, lr, momentum, weight_decay, batches, optimizer))
