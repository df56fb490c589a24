"""A smaller initial scale for batch normalization, and a smaller learning rate for it.

Revisiting Batch Norm Initialization (version 1: Revisiting Batch Normalization), Jim Davis, Logan Frank, ECCV 2022,
arXiv 2110.13989.

Where ReLU, pooling and addition are all that stands between normalizations, a network scales through: with the scale
``gamma_0 = s`` everywhere it is the network with ``gamma_0 = 1`` whose pooled features are multiplied by ``s`` before
the classifier, trained with the rates ``lr / (c s^2)`` of gamma and ``lr / s^2`` of beta (and ``eps / s^2`` in every
normalization behind another one). The arms of the ablation are those pieces.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from normkit.inspection.compiling import guard_hooks
from normkit.inspection.graph import dataflow
from normkit.inspection.norms import has_initial_statistics
from normkit.methods.method import Method, Part, Recipe
from normkit.methods.revisited.input_norm import InputNorm, with_input_norm
from normkit.optim.param_groups import LR_MARK

Arm: TypeAlias = Literal["paper", "logit_scale", "shift_lr", "both", "scale_lr"]


@dataclass(frozen=True)
class Revision:
    """The changes to every batch normalization of a model.

    Attributes:
        arm: Which arm this is.
        scale: Initial scale gamma_0.
        scale_lr: Factor on the learning rate of gamma.
        shift_lr: Factor on the learning rate of beta.
        logit_scale: Factor on the features that the classifier takes.
    """

    arm: Arm = "paper"
    scale: float = 1.0
    scale_lr: float = 1.0
    shift_lr: float = 1.0
    logit_scale: float = 1.0

    @property
    def lr_factors(self) -> dict[str, float]:
        """Factors on the learning rates of a layer's parameters, by name."""
        return {"weight": self.scale_lr, "bias": self.shift_lr}

    def __str__(self) -> str:
        return (
            f"revisited ({self.arm}): scale starts at {self.scale:g}, its learning rate x {self.scale_lr:g}, the shift's "
            f"x {self.shift_lr:g}"
        )


def revision(arm: Arm, scale: float, scale_lr_divisor: float) -> Revision:
    """Return the revision of an arm, with ``s = scale`` and ``c = scale_lr_divisor``.

    ``paper``: gamma_0 = s, gamma's rate / c. ``logit_scale``: features times s. ``shift_lr``: beta's rate / s^2.
    ``both``: these two, and gamma's rate / (c s^2), which together are the paper's network (at s = 0.1, c = 100 gamma
    learns at the common rate). ``scale_lr``: gamma's rate / c at gamma_0 = 1.

    Examples:
        >>> revision("both", 0.1, 100.0)
        Revision(arm='both', scale=1.0, scale_lr=1.0, shift_lr=100.0, logit_scale=0.1)
    """
    shift = round(1 / scale**2, 12)  # 1 / 0.1**2 is 99.99999999999999
    pieces: dict[str, Revision] = {
        "paper": Revision("paper", scale=scale, scale_lr=1 / scale_lr_divisor),
        "logit_scale": Revision("logit_scale", logit_scale=scale),
        "shift_lr": Revision("shift_lr", shift_lr=shift),
        "both": Revision("both", logit_scale=scale, shift_lr=shift, scale_lr=shift / scale_lr_divisor),
        "scale_lr": Revision("scale_lr", scale_lr=1 / scale_lr_divisor),
    }
    return pieces[arm]


class FeatureScale:
    """Forward pre-hook, with keyword arguments, that multiplies the input of a layer."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """The arguments, the first one scaled; without ``kwargs`` in models pickled before the hook took them."""
        scaled = (args[0] * self.factor, *args[1:]) if args else args
        if kwargs is None:
            return scaled
        return scaled, kwargs if args else {**kwargs, "input": kwargs["input"] * self.factor}


def tag(module: nn.Module, change: Revision | None) -> None:
    """Record on a normalization layer how it was revised; the record survives ``deepcopy`` and pickling."""
    if change is not None:
        setattr(module, LR_MARK, change)


def revision_of(model: nn.Module) -> Revision | None:
    """Return the revision that [`normkit.revisit`][] applied to a model or a normalization layer, or None."""
    return next((m for module in model.modules() if (m := vars(module).get(LR_MARK)) is not None), None)


@torch.no_grad()
def revisit(model: nn.Module, *, scale: float = 0.1, scale_lr_divisor: float = 100.0, arm: Arm = "paper") -> nn.Module:
    """Give every BatchNorm of a built model a small initial scale, and gamma a smaller learning rate (arXiv 2110.13989).

    Sets gamma to ``scale`` and beta to 0 on every BatchNorm (by type, subclasses too, whatever the model's builder had
    set), multiplies the scale of an [`normkit.InputNorm`][], and marks the layers so that
    [`normkit.param_groups`][] gives gamma the learning rate ``lr / scale_lr_divisor``. Build the optimizer from
    those groups. The marks survive ``deepcopy`` and pickling; layers without a scale (``affine=False``) are passed
    over.

    Running variances that have seen no batch start at ``scale ** 2`` instead of 1 behind another BatchNorm, since the inputs
    have that variance. Otherwise evaluation in the first hundred steps is far off (our addition).

    Args:
        model: Any module; changed in place.
        scale: Initial scale gamma_0.
        scale_lr_divisor: c, the divisor of gamma's learning rate.
        arm: ``paper``, or one piece of it for an ablation, see ``revision``. The factor on the features is a
            forward pre-hook of the last linear layer: it is part of the model, but not of its state dict.

    Returns:
        The model.

    Raises:
        ValueError: An argument is out of its range, the model has been revisited already, has no BatchNorm with a
            scale, or has one that is lazy and not yet initialized.

    Examples:
        >>> model = revisit(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        >>> [round(g, 2) for g in model[1].weight.tolist()], revision_of(model).scale_lr
        ([0.1, 0.1, 0.1], 0.01)
    """
    if arm not in get_args(Arm):
        raise ValueError(f"revisit: unknown arm {arm!r}; choose one of {', '.join(get_args(Arm))}")
    for name, value in (("scale", scale), ("scale_lr_divisor", scale_lr_divisor)):
        if not 0 < value < float("inf"):
            raise ValueError(f"revisit: {name} is {value}; give a positive number")
    norms = _norms(model)
    classifier = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    change = revision(arm, scale, scale_lr_divisor)
    if change.logit_scale != 1:
        if classifier is None:
            raise ValueError(f"revisit: arm {arm!r} scales the input of the classifier; the model has no linear layer")
        guard_hooks()
        classifier.register_forward_pre_hook(FeatureScale(change.logit_scale), with_kwargs=True)
    behind = _behind_a_norm(model)
    for norm in norms:
        if isinstance(norm, InputNorm):
            norm.weight.mul_(change.scale)
        else:
            norm.weight.fill_(change.scale)
            if norm.bias is not None:
                norm.bias.zero_()
            if norm in behind and norm.running_var is not None and has_initial_statistics(norm):
                norm.running_var.mul_(change.scale**2)
        tag(norm, change)
    return model


def _behind_a_norm(model: nn.Module) -> set[nn.Module]:
    """The layers to revisit whose input is known to depend on the output of another one."""
    flow, modules = dataflow(model), dict(model.named_modules())
    layers = [modules.get(step.path or "") if step.name == "module" else None for step in flow.steps]
    norms = {index for index, layer in enumerate(layers) if isinstance(layer, _BatchNorm | InputNorm)}
    return {layer for i in norms if norms & flow.ancestors[i] and (layer := layers[i]) is not None}


def _norms(model: nn.Module) -> list[_BatchNorm | InputNorm]:
    """The layers to revisit, each once.

    Raises:
        ValueError: There is none, one was revisited already, or one is lazy.
    """
    found: list[_BatchNorm | InputNorm] = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm | InputNorm) or module.weight is None:
            continue
        if revision_of(module) is not None:
            raise ValueError(
                f"revisit: {path or 'the model'} is {revision_of(module)}, already; a second time "
                "would undo what it has learned: build the model anew"
            )
        if is_lazy(module.weight):
            raise ValueError(
                f"revisit: {path or 'the model'} ({type(module).__name__}) does not know its features yet; run one "
                "batch through the model first"
            )
        found.append(module)
    if not any(isinstance(norm, _BatchNorm) for norm in found):
        raise ValueError(
            "revisit: the model has no BatchNorm with a scale (affine=True); use it on a model with BatchNorm, before "
            "converting to another normalization"
        )
    return found


def revisit_model(
    model: nn.Module, batches: Iterable[Any] | None, *, input_norm: bool = False, **options: Any
) -> nn.Module:
    """:func:`revisit` a model, with online normalization of its inputs if ``input_norm``."""
    return revisit(with_input_norm(model, batches) if input_norm else model, **options)


_PAPER = "Davis, Frank 2022, arXiv 2110.13989"
_GROUP = "Revisited batch normalization"
_OPTIONS = ("scale", "scale_lr_divisor")


def _ablation(name: str, summary: str, lr: float, arm: Arm) -> Recipe:
    prepare = Part(revisit_model, *_OPTIONS, arm=arm)
    return Recipe(name, summary, _PAPER, lr, prepare=prepare, typed=True, group=_GROUP, ablation=True)


METHOD = Method(
    recipes=(
        Recipe(
            "revisited",
            "BatchNorm, scale starts at 0.1, its rate / 100",
            _PAPER,
            0.3,
            prepare=Part(revisit_model, *_OPTIONS),
            typed=True,
            group=_GROUP,
        ),
        Recipe(
            "revisited+input",
            "Revisited BatchNorm, inputs normalized online",
            _PAPER,
            0.3,
            prepare=Part(revisit_model, *_OPTIONS, input_norm=True),
            typed=True,
            group=_GROUP,
            ablation=True,
        ),
        _ablation("revisited-logit-scale", "Ablation of revisited: features x 0.1 only", 0.3, "logit_scale"),
        _ablation("revisited-shift-lr", "Ablation of revisited: rate of beta x 100 only", 0.1, "shift_lr"),
        _ablation("revisited-both", "Ablation of revisited: features x 0.1, beta rate x 100", 0.3, "both"),
        _ablation("revisited-scale-lr", "Ablation of revisited: rate of gamma / 100 only", 0.1, "scale_lr"),
        Recipe(
            "revisited-decay",
            "Ablation of revisited: norms and biases do not decay",
            _PAPER,
            0.1,
            typed=True,
            group=_GROUP,
            ablation=True,
        ),
        Recipe(
            "batch+input",
            "Ablation of revisited: batch normalization, the inputs normalized online; norms and biases not decayed",
            _PAPER,
            0.1,
            prepare=Part(with_input_norm),
            typed=True,
            group=_GROUP,
            ablation=True,
        ),
        Recipe(
            "revisited+sgd-g",
            "Revisited BatchNorm and SGD-G together",
            _PAPER,
            0.2,
            prepare=Part(revisit_model, *_OPTIONS),
            optimizer="sgd-g",
            group=_GROUP,
            ablation=True,
            revision=2,
        ),
    )
)
