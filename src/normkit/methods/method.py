"""Declare methods as data: recipes, conversion targets, and the parts that layers share.

A method's file ends with ``METHOD = Method(recipes=..., targets=...)``; :mod:`normkit.methods.catalog` lists them.
``normkit.apply`` carries out recipes, ``normkit.convert`` builds targets.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Adam, AdamW, Optimizer

from normkit.inspection.branches import branch_ends
from normkit.inspection.norms import (
    PRODUCERS,
    NormTraits,
    features_of,
    is_batchnorm,
    is_frozen_norm,
    running_statistics,
    running_tensors,
    statistics_of,
)
from normkit.moments import keep_fp32
from normkit.optim.param_groups import param_groups

Dims: TypeAlias = Callable[[], int]
"""Tells on demand whether a layer sees sequences (1), images (2) or volumes (3); raises where that is unknown."""

ParamGroups: TypeAlias = list[dict[str, Any]]
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")

_Layer = TypeVar("_Layer", bound="Successor")


class Part:
    """One step of a recipe: the function, and the settings that the user may change.

    Args:
        does: The function, or the name of a conversion target.
        options: Names of keyword arguments that the user may give.
        preset: Keyword arguments that the recipe gives; the user's go first.
    """

    def __init__(self, does: Any, *options: str, **preset: Any) -> None:
        self.does, self.options, self.preset = does, options, preset

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments, with the user's options that belong to this part."""
        return {**self.preset, **{name: given[name] for name in self.options if name in given}}


@dataclass(frozen=True)
class Recipe:
    """One method: its name, its source, and how to apply it to a model.

    Attributes:
        name: The name on the command line.
        summary: One line that says what it does.
        paper: Authors, year, arXiv number.
        lr: Centre of the learning-rate grid in a study with this method, at batch size 64.
        convert: The conversion target, with settings of the new layers.
        prepare: ``prepare(model, batches, **settings) -> model``, called on the converted model.
        optimizer: ``optimizer(request, model, **settings)`` of a method that brings its own; or the name of the recipe
            whose optimizer it takes. ``lr`` is a rate of that one.
        typed: Whether the user's optimizer gets typed parameter groups, see ``normkit.param_groups``, or a single one.
        attach: ``attach(model, optimizer, **settings)``, called last.
        lr_exponent: The centre moves with ``(batch_size / 64) ** lr_exponent``.
        group: Heading in a list of methods.
        ablation: Whether it is a variant of another recipe or an arm of an ablation, which short lists leave out.
        revision: Raised whenever the method's numbers change, so that old results are not mixed with new ones.
    """

    name: str
    summary: str
    paper: str
    lr: float
    convert: Part | None = None
    prepare: Part | None = None
    optimizer: Part | str | None = None
    typed: bool = False
    attach: Part | None = None
    lr_exponent: float = 0.5
    group: str = "Other methods"
    ablation: bool = False
    revision: int = 1

    @property
    def own_optimizer(self) -> bool:
        """Whether it brings its own optimizer."""
        return self.optimizer is not None

    @property
    def without_layers(self) -> bool:
        """Whether no normalization layer stays."""
        return self.convert is not None and self.convert.does == "none"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The steps that take settings, in the order in which they are carried out."""
        return tuple(p for p in (self.convert, self.prepare, self.optimizer, self.attach) if isinstance(p, Part))

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the settings that ``normkit.apply(..., options={...})`` takes."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.options))


@dataclass(frozen=True)
class Target:
    """One thing to convert to.

    Attributes:
        build: Makes the new layer from a normalization layer, with settings of the new layer; it shares the parameters
            that mean the same.
        is_native: Whether a layer is that already.
        lost: What the layer no longer keeps or does, in words.
        channels_last: Whether it can stand in for a layer normalization, whose channels are the last dimension.
        configurable: Whether ``build`` takes settings of the new layer.
        freezes_bias: Whether the bias of the layer before is no longer trained: the new layer takes a constant out, but,
            without the projection of batch normalization's backward pass, does not stop it from being trained, and it
            would grow for nothing.
        another: Whether a batch normalization in evaluation becomes another function.
    """

    build: Callable[..., nn.Module]
    is_native: Callable[[nn.Module], bool]
    lost: str = ""
    channels_last: bool = False
    configurable: bool = False
    freezes_bias: bool = False
    another: bool = False


@dataclass(frozen=True)
class Method:
    """All declarations of a method's file.

    Attributes:
        recipes: What ``normkit.apply`` can do.
        targets: What ``normkit.convert`` can convert to, by name.
    """

    recipes: tuple[Recipe, ...] = ()
    targets: Mapping[str, Target] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The numbers and the optimizer that the user asked ``normkit.apply`` for.

    Attributes:
        lr: Learning rate.
        momentum: Momentum of SGD-like optimizers.
        weight_decay: Weight decay of the weights.
        optimizer: A kind of :data:`OPTIMIZERS`, or whatever makes an optimizer from parameter groups.
        batches: Batches for methods that start from data, or None.
        options: The user's settings of the method.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer: str | Callable[[ParamGroups], Optimizer] = "sgd"
    batches: Iterable[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def make_optimizer(request: Request, model: nn.Module, *, typed: bool = False) -> Optimizer:
    """Build the user's optimizer over all parameters of ``model``.

    Args:
        request: What the user asked for.
        model: The model as it will be trained.
        typed: Whether weights alone decay, each kind of parameter in a group of its own.

    Raises:
        ValueError: The user's callable makes no optimizer, or one without the weight decay that was asked for.
    """
    lr, decay = request.lr, request.weight_decay
    groups: ParamGroups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": decay}]
    if typed:
        groups = param_groups(model, lr=lr, weight_decay=decay)
    if not isinstance(request.optimizer, str):
        made = request.optimizer(groups)
        if not isinstance(made, Optimizer):
            raise ValueError(
                f"apply: optimizer returned a {type(made).__name__}; return a torch optimizer over the groups"
            )
        if decay and "weight_decay" not in made.defaults:
            raise ValueError(
                f"apply: {type(made).__name__} has no weight decay, which is {decay}; leave weight_decay out"
            )
        return made
    if request.optimizer == "adam":
        return Adam(groups, lr=lr, weight_decay=decay)
    if request.optimizer == "adamw":
        return AdamW(groups, lr=lr, weight_decay=decay)
    nesterov = request.optimizer == "nesterov"
    return SGD(groups, lr=lr, momentum=request.momentum, weight_decay=decay, nesterov=nesterov)


def adam(request: Request, model: nn.Module) -> Adam:
    """Build Adam with the usual betas, for methods that bring it; the request's momentum is not used."""
    return Adam(model.parameters(), lr=request.lr, weight_decay=request.weight_decay)


class Successor(NormTraits):
    """A layer that replaces a batch normalization; a mixin.

    Attributes:
        carries: Settings that mean the same as batch normalization's of the same name.
    """

    carries: ClassVar[tuple[str, ...]] = ("eps",)

    @classmethod
    def from_batchnorm(cls: type[_Layer], norm: nn.Module, *args: Any, **settings: Any) -> _Layer:
        """Build a layer with the parameter objects, the running statistics and the mode of ``norm``.

        In eval mode it computes what ``norm`` computes, if it evaluates by running statistics. Without such in ``norm``
        they start at (0, 1).

        Args:
            norm: A batch normalization whose channels are known.
            *args: Further arguments of the layer, after the number of features.
            **settings: Likewise, by name.

        Returns:
            The new layer; optimizers that hold the parameters of ``norm`` go on with them.

        Raises:
            TypeError: ``norm`` is no batch normalization, or a lazy one that has seen no input.
        """
        if not isinstance(norm, _BatchNorm) or any(is_lazy(t) for t in (*norm.parameters(), *norm.buffers())):
            raise TypeError(f"from_batchnorm: expected a BatchNorm layer with known channels, got {norm}")
        like = next(iter((*norm.parameters(), *norm.buffers())), torch.empty(0))
        carried = {name: getattr(norm, name) for name in cls.carries}
        own: dict[str, Any] = {"affine": norm.affine, "device": like.device, "dtype": like.dtype, **carried, **settings}
        layer: Any = cls(norm.num_features, *args, **own)  # pyright: ignore[reportCallIssue]
        if own["affine"]:
            share_affine(norm, layer)
        for name, tensor in running_tensors(norm).items():
            if name in layer._buffers:
                layer._buffers[name] = tensor.clone()
            elif name in layer._parameters:
                layer._parameters[name].data.copy_(tensor)
        return layer.train(norm.training)


class WideStatistics(nn.Module):
    """A layer whose running statistics stay in fp32 or wider under ``half()``; a mixin.

    Attributes:
        wide: Names of the tensors that stay so.
    """

    wide: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = [getattr(self, name).data for name in self.wide]
        super()._apply(fn, recurse)
        for name, old in zip(self.wide, before, strict=True):
            statistic = getattr(self, name)
            statistic.data = keep_fp32(statistic.data, old)
        return self


def share_affine(source: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the ``weight`` and ``bias`` objects of ``source``; None where there is none."""
    for name in ("weight", "bias"):
        setattr(new, name, source._parameters.get(name))
    if "affine" in vars(new):
        vars(new)["affine"] = new.weight is not None


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

FROM_START = "statistics start at (0, 1) where the replaced layer had none"


def spatial_dims(path: str, norm: nn.Module, producer: nn.Module | None, model: nn.Module) -> int:
    """Return the number of spatial dimensions of ``norm``: its own, of the layer before it, or of the model's convolutions.

    Raises:
        ValueError: They cannot be told.
    """
    for family in (_BATCH_NORMS, _INSTANCE_NORMS):
        for dims, cls in enumerate(family, start=1):
            if isinstance(norm, cls):
                return dims
    if isinstance(norm, NormTraits) and norm.dimensions:
        return max(norm.dimensions) - 2
    if isinstance(producer, nn.Linear):
        return 1
    layers = [producer] if isinstance(producer, _ConvNd) else [m for m in model.modules() if isinstance(m, _ConvNd)]
    found = {len(layer.kernel_size) for layer in layers}
    if len(found) != 1:
        raise ValueError(
            f"{path}: cannot tell whether this {type(norm).__name__} sees sequences, images or volumes; convert it "
            "by hand, or leave it out with `where`"
        )
    return found.pop()


def to_batchnorm(source: nn.Module, dims: Dims) -> nn.Module:
    """Return ``source`` if it is a batch normalization, else one with its parameters and statistics.

    One whose four tensors are buffers, as detectors have it, becomes one with parameters.
    """
    if is_batchnorm(source):
        return source
    like = next((t for t in (*source.parameters(), *source.buffers())), torch.empty(0))
    options = {name: vars(source)[name] for name in ("eps", "momentum") if name in vars(source)}
    if statistics_of(source) == "batch":
        options["track_running_stats"] = running_statistics(source) is not None
    cls = _BATCH_NORMS[dims() - 1]
    new = cls(features_of(source), affine=False, device=like.device, dtype=like.dtype, **options)
    new._buffers.update({name: t for name, t in running_tensors(source).items() if name in new._buffers})
    share_affine(source, new)
    if is_frozen_norm(source):
        new.affine = True
        for name in ("weight", "bias"):
            setattr(new, name, nn.Parameter(source.get_buffer(name).clone()))
    return new.train(source.training)


def layer_target(
    classes: tuple[Any, Any, Any], lost: str = FROM_START, *, fixed: Mapping[str, Any] | None = None, **facts: Any
) -> Target:
    """Return the conversion target of three layers of this package, for sequences, images and volumes.

    Args:
        classes: The layers, subclasses of :class:`Successor`.
        lost: See :class:`Target`.
        fixed: Settings that tell it from other targets of the same classes.
        facts: Further attributes of the target.
    """
    own = dict(fixed or {})

    def build(source: nn.Module, dims: Dims, **settings: Any) -> nn.Module:
        if isinstance(source, nn.LayerNorm):
            like = {"device": source.weight.device, "dtype": source.weight.dtype} if source.elementwise_affine else {}
            options = {"feature_dim": -1, "eps": source.eps, **like, **own, **settings}
            new = classes[0](source.normalized_shape[-1], affine=source.elementwise_affine, **options)
        else:
            new = classes[dims() - 1].from_batchnorm(to_batchnorm(source, dims), **own, **settings)
        share_affine(source, new)
        return new

    def is_native(module: nn.Module) -> bool:
        return isinstance(module, classes) and all(getattr(module, name, None) == v for name, v in own.items())

    return Target(build, is_native, lost, configurable=True, **facts)


@torch.no_grad()
def zero_last_weights(model: nn.Module) -> nn.Module:
    """Set weight and bias of the last layer of every residual branch to zero: each block starts as its shortcut.

    For networks whose branches end in a linear or convolution layer: normalization layers removed, or pre-activation. A
    part of Fixup Initialization (Zhang, Dauphin, Ma 2019, arXiv 1901.09321).

    Args:
        model: A model with such branches; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: No residual branch ends in a linear or convolution layer.
    """
    ends = [layer for path in branch_ends(model) if isinstance(layer := model.get_submodule(path), PRODUCERS)]
    if not ends:
        raise ValueError(
            "zero_last_weights: no residual branch of the model ends in a linear or convolution layer; plain networks have "
            "no such branch, and in networks that torch.fx does not trace none is found: leave the option zero_residual out"
        )
    for layer in ends:
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    return model


def _zero_residual(model: nn.Module, batches: object, zero_residual: bool = False) -> nn.Module:
    return zero_last_weights(model) if zero_residual else model


ZERO_RESIDUAL = Part(_zero_residual, "zero_residual")
"""What a recipe without normalization layers prepares: the user's choice that residual branches start at zero."""
