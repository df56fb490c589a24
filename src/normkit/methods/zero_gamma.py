"""Residual blocks that start as the identity: the last scale or the last weight of each block begins at zero.

Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, Priya Goyal, Piotr Dollár, Ross Girshick and others,
arXiv 1706.02677. Without a normalization, as the last weight: Fixup Initialization, Hongyi Zhang, Yann Dauphin, Tengyu Ma,
arXiv 1901.09321.
"""

import torch
from torch import Tensor, nn

from normkit.inspection.branches import branch_ends
from normkit.inspection.graph import Dataflow
from normkit.inspection.norms import PRODUCERS, is_norm
from normkit.methods.method import Method, Part, Recipe


def last_norms(model: nn.Module, flow: Dataflow | None = None) -> list[str]:
    """Paths of the normalization layers whose output ends a residual branch, see ``branch_ends``.

    Args:
        model: Any module.
        flow: Its data flow, when it is known already.

    Returns:
        Paths in the order of execution.
    """
    return [path for path in branch_ends(model, flow) if is_norm(model.get_submodule(path))]


@torch.no_grad()
def zero_gamma(model: nn.Module) -> nn.Module:
    """Set the last normalization of every residual block to scale zero: each block starts as its shortcut.

    Args:
        model: A model whose residual branches end in a normalization; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: No residual branch ends in a normalization with a scale.
    """
    modules = dict(model.named_modules())
    scales = [w for path in last_norms(model) if isinstance(w := modules[path]._parameters.get("weight"), Tensor)]
    if not scales:
        raise ValueError(
            "zero_gamma: no residual branch of the model ends in a normalization layer with a scale; plain networks "
            "have no such branch, in pre-activation networks (WRN) it ends in a convolution, and in networks that torch.fx "
            "does not trace (data-dependent shapes) none is found: use a ResNet"
        )
    for scale in scales:
        scale.zero_()
    return model


@torch.no_grad()
def zero_last_weights(model: nn.Module) -> nn.Module:
    """Set weight and bias of the last layer of every residual branch to zero: each block starts as its shortcut.

    For networks whose branches end in a linear or convolution layer: normalization layers removed, or pre-activation.

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
            "no such branch, and in networks that torch.fx does not trace none is found: leave out zero_residual"
        )
    for layer in ends:
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    return model


METHOD = Method(
    recipes=(
        Recipe(
            "zero-gamma",
            "Residual blocks start as identity",
            "Goyal et al. 2017, arXiv 1706.02677",
            0.1,
            prepare=Part(lambda model, batches: zero_gamma(model)),
            group="Batch normalization and its relatives",
        ),
    )
)
