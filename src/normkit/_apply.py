"""The one list of methods: name -> (model, optimizer).

The study, the command line, the adapters and the docs read this list; nothing else knows a method's name.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from normkit.methods.batchless.layer import batchless_layers
from normkit.methods.batchless.training import attach, initialize
from normkit.methods.bnp.bnp import BNP
from normkit.methods.frozen import warn_if_untrained
from normkit.methods.revisited.input_norm import with_input_norm
from normkit.methods.revisited.revisit import Arm, revisit
from normkit.methods.riemannian.optimizers import SGDG, AdamG
from normkit.methods.weight_standardization.normalizer_free import attach_clipping, normalizer_free
from normkit.methods.weight_standardization.standardize import standardize_weights
from normkit.methods.zero_gamma import zero_gamma
from normkit.optim.invariance import Rule
from normkit.optim.param_groups import param_groups
from normkit.surgery._convert import convert, revert
from normkit.surgery.conversion_state import origin_of


@dataclass(frozen=True)
class Request:
    """What the user asked [`normkit.apply`][] for; a recipe's ``build`` turns it into (model, optimizer).

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
        own_optimizer: Whether it brings its own optimizer, so that ``lr`` is a rate of that one.
    """

    name: str
    summary: str
    paper: str
    lr: float
    build: Callable[[Request], tuple[nn.Module, Optimizer]]
    lr_exponent: float = 0.5
    own_optimizer: bool = False


def sgd(request: Request, model: nn.Module, *, typed: bool = False) -> Optimizer:
    """The optimizer most recipes use: SGD, unless the request names another; ``typed`` groups decay weights alone."""
    groups = param_groups(model, lr=request.lr, weight_decay=request.weight_decay)
    params = groups if typed else model.parameters()
    if request.optimizer == "adam":
        return Adam(params, lr=request.lr, weight_decay=request.weight_decay)
    if request.optimizer == "adamw":
        return AdamW(params, lr=request.lr, weight_decay=request.weight_decay)
    return SGD(
        params,
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


@contextmanager
def _conversion(model: nn.Module, to: str, **settings: Any) -> Generator[nn.Module, None, None]:
    """Convert a model; if what is built on it raises, it becomes what it was.

    Yields:
        The converted model.
    """
    untouched = not any(origin_of(module) for module in model.modules())
    converted = convert(model, to, **settings)
    try:
        yield converted
    except BaseException:
        if untouched:
            revert(converted)
        raise


def _converted(to: str, **settings: Any) -> Callable[[Request], tuple[nn.Module, Optimizer]]:
    def build(request: Request) -> tuple[nn.Module, Optimizer]:
        with _conversion(request.model, to, **settings) as model:
            return model, sgd(request, model)

    return build


def _typed(request: Request) -> tuple[nn.Module, Optimizer]:
    return request.model, sgd(request, request.model, typed=True)


def _revisited(arm: Arm = "paper", *, input_norm: bool = False) -> Callable[[Request], tuple[nn.Module, Optimizer]]:
    def build(request: Request) -> tuple[nn.Module, Optimizer]:
        model = with_input_norm(request.model, request.batches) if input_norm else request.model
        revisit(model, arm=arm)
        return model, sgd(request, model, typed=True)

    return build


def _bnp(
    to: str, optimizer: Callable[[Request, nn.Module], Optimizer], max_change: float | None = None
) -> Callable[[Request], tuple[nn.Module, Optimizer]]:
    def build(request: Request) -> tuple[nn.Module, Optimizer]:
        with _conversion(request.model, to) as model:
            stepped = optimizer(request, model)
            BNP(model, max_change=max_change).attach(stepped)
            return model, stepped

    return build


def _batchless(
    to: str, optimizer: Callable[[Request, nn.Module], Optimizer], **settings: Any
) -> Callable[[Request], tuple[nn.Module, Optimizer]]:
    def build(request: Request) -> tuple[nn.Module, Optimizer]:
        with _conversion(request.model, to, **settings) as model:
            if request.batches is not None and batchless_layers(model):
                initialize(model, request.batches)
            stepped = optimizer(request, model)
            if batchless_layers(model):
                attach(model, stepped)
            return model, stepped

    return build


def _frozen(request: Request) -> tuple[nn.Module, Optimizer]:
    with _conversion(request.model, "frozen") as model:
        warn_if_untrained(model)
        return model, sgd(request, model)


def _standardized_groups(request: Request) -> tuple[nn.Module, Optimizer]:
    with _conversion(request.model, "group") as model:
        standardize_weights(model)
        return model, sgd(request, model)


def _normalizer_free(request: Request) -> tuple[nn.Module, Optimizer]:
    with _conversion(request.model, "none") as model:
        normalizer_free(model)
        stepped = sgd(request, model, typed=True)
        attach_clipping(model, stepped)
        return model, stepped


def _zero_gamma(request: Request) -> tuple[nn.Module, Optimizer]:
    return zero_gamma(request.model), sgd(request, request.model)


def _riemannian(
    optimizer: type[SGDG] | type[AdamG], divisor: float, rule: Rule = "exact"
) -> Callable[[Request], tuple[nn.Module, Optimizer]]:
    """The request's rate is the manifold's; the other weights' is the paper's proportion of it."""

    def build(request: Request) -> tuple[nn.Module, Optimizer]:
        groups = param_groups(
            request.model,
            lr=request.lr / divisor,
            weight_decay=request.weight_decay,
            manifold_lr=request.lr,
            rule=rule,
        )
        return request.model, optimizer(groups, momentum=request.momentum)

    return build


def _revisited_sgdg(request: Request) -> tuple[nn.Module, Optimizer]:
    revisit(request.model)
    return _riemannian(SGDG, 20)(request)


_REVISITED = "Davis, Frank 2022, arXiv 2110.13989"
_BNP = "Lange, Helfrich, Ye 2022, arXiv 2108.01110"
_BATCHLESS = "Berger, Uc Cetina 2022, arXiv 2212.14729"
_GRASSMANN = "Cho, Lee 2017, arXiv 1709.09603"
_HELPS = "Santurkar et al. 2018, arXiv 1805.11604"

_RECIPES: tuple[Recipe, ...] = (
    Recipe("none", "Normalization layers removed, biases restored", "the baseline", 0.1, _converted("none")),
    Recipe("batch", "Batch normalization as the model has it", "Ioffe, Szegedy 2015, arXiv 1502.03167", 0.1, _batch),
    Recipe("group", "Group normalization", "Wu, He 2018, arXiv 1803.08494", 0.1, _converted("group")),
    Recipe(
        "layer",
        "Layer normalization over channels and space",
        "Ba et al. 2016, arXiv 1607.06450",
        0.1,
        _converted("layer"),
    ),
    Recipe("instance", "Instance normalization", "Ulyanov et al. 2016, arXiv 1607.08022", 0.1, _converted("instance")),
    Recipe(
        "group+ws",
        "Group normalization behind standardized filters",
        "Qiao et al. 2019, arXiv 1903.10520",
        0.1,
        _standardized_groups,
    ),
    Recipe(
        "frozen",
        "Batch normalization with the statistics it has, scale and shift trained",
        "Ren et al. 2015, arXiv 1506.01497",
        0.1,
        _frozen,
    ),
    Recipe(
        "online",
        "Running statistics per sample, gradients projected over time",
        "Chiley et al. 2019, arXiv 1905.05894",
        0.1,
        _converted("online"),
    ),
    Recipe(
        "normalizer-free",
        "No layers: scaled standardized filters, SkipInit, adaptive clipping",
        "Brock et al. 2021, arXiv 2102.06171",
        0.1,
        _normalizer_free,
    ),
    Recipe(
        "batch-renorm",
        "Batch normalization corrected towards its running statistics",
        "Ioffe 2017, arXiv 1702.03275",
        0.1,
        _converted("batch-renorm", warmup=100, r_steps=800, d_steps=500),  # a fiftieth of the paper's schedule
    ),
    Recipe(
        "sgd-g",
        "Scale-invariant filters on the unit sphere, SGD",
        _GRASSMANN,
        0.2,
        _riemannian(SGDG, 20),
        own_optimizer=True,
    ),
    Recipe(
        "adam-g",
        "Scale-invariant filters on the unit sphere, Adam",
        _GRASSMANN,
        0.05,
        _riemannian(AdamG, 5),
        own_optimizer=True,
    ),
    Recipe(
        "sgd-g-paper",
        "The same, on the sphere every convolution with fewer filters than fan-in",
        _GRASSMANN,
        0.2,
        _riemannian(SGDG, 20, "paper"),
        own_optimizer=True,
    ),
    Recipe(
        "adam-g-paper",
        "The same choice of weights, Adam",
        _GRASSMANN,
        0.05,
        _riemannian(AdamG, 5, "paper"),
        own_optimizer=True,
    ),
    Recipe("noisy-batch", "Batch normalization, then shifting noise: a probe", _HELPS, 0.1, _converted("noisy-batch")),
    Recipe("l1", "Normalization by the mean magnitude", _HELPS, 0.1, _converted("l1")),
    Recipe("l2", "Normalization by the root mean square", _HELPS, 0.1, _converted("l2")),
    Recipe("linf", "Normalization by the largest magnitude", _HELPS, 0.1, _converted("linf")),
    Recipe("bnp", "No layers: gradients preconditioned, steps bounded", _BNP, 0.3, _bnp("none", sgd, 0.05)),
    Recipe("bnp-paper", "The same as published, without a bound on the step", _BNP, 0.03, _bnp("none", sgd)),
    Recipe("bnp-adam", "The same before Adam", _BNP, 0.001, _bnp("none", adam), own_optimizer=True),
    Recipe("group+bnp", "Group normalization and preconditioned gradients", _BNP, 0.1, _bnp("group", sgd, 0.05)),
    Recipe("batchless", "Normalization by learned Gaussians", _BATCHLESS, 0.03, _batchless("batchless", sgd)),
    Recipe(
        "batchless-adam",
        "The same, trained by Adam as in the paper",
        _BATCHLESS,
        0.001,
        _batchless("batchless", adam, gradient="plain"),
        own_optimizer=True,
    ),
    Recipe(
        "batchless-projected",
        "Learned Gaussians; weight gradients without what the normalization undoes",
        _BATCHLESS + ", gradient ours",
        0.1,
        _batchless("batchless-projected", sgd),
        lr_exponent=0.75,  # at batch sizes 16 and 1 the best of a grid was its lowest
    ),
    Recipe("revisited", "Batch normalization from scale 0.1, its rate / 100", _REVISITED, 0.3, _revisited()),
    Recipe(
        "revisited+input",
        "The same, and the inputs normalized online",
        _REVISITED,
        0.3,
        _revisited(input_norm=True),
    ),
    Recipe("revisited-logit-scale", "Its piece: features x 0.1", _REVISITED, 0.3, _revisited("logit_scale")),
    Recipe("revisited-shift-lr", "Its piece: learning rate of beta x 100", _REVISITED, 0.1, _revisited("shift_lr")),
    Recipe("revisited-both", "Its pieces: features x 0.1, beta's rate x 100", _REVISITED, 0.3, _revisited("both")),
    Recipe("revisited-scale-lr", "Its piece: learning rate of gamma / 100", _REVISITED, 0.1, _revisited("scale_lr")),
    Recipe("revisited-decay", "Its piece: batch normalization, norms and biases not decayed", _REVISITED, 0.1, _typed),
    Recipe(
        "revisited+sgd-g",
        "The revisited scale, filters on the unit sphere",
        _REVISITED,
        0.2,
        _revisited_sgdg,
        own_optimizer=True,
    ),
    Recipe("zero-gamma", "Residual blocks start as identity", "Goyal et al. 2017, arXiv 1706.02677", 0.1, _zero_gamma),
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
        name: One of [`normkit.recipes`][].
        model: Any module; methods that convert layers do so in place (use the returned model).
        lr: Learning rate.
        batches: Batches for methods that start from data.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay.
        optimizer: ``sgd``, ``nesterov``, ``adam`` or ``adamw``; methods with an optimizer of their own keep it.

    Returns:
        The model to train and the optimizer to step.

    Raises:
        ValueError: The method or the optimizer is unknown, a number is negative, or the method refuses the model.
    """
    table = recipes()
    if name not in table:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(table)}")
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(_OPTIMIZERS)}")
    for option, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"apply: {option} is {value}; give a number that is not negative")
    return table[name].build(Request(model, lr, momentum, weight_decay, batches, optimizer))
