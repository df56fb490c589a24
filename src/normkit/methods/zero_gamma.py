"""Residual blocks that start as the identity: the last normalization of each block begins with scale zero.

Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, Priya Goyal, Piotr Dollár, Ross Girshick and others,
arXiv 1706.02677.
"""

import torch
from torch import Tensor, nn

from normkit.inspection.branches import branch_ends
from normkit.inspection.graph import Dataflow
from normkit.inspection.norms import is_norm
from normkit.methods.method import Method, Part, Recipe


def last_norms(model: nn.Module, flow: Dataflow | None = None) -> list[str]:
    """Return the paths of the normalization layers that end a residual branch, see ``branch_ends``.

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


METHOD = Method(
    recipes=(
        Recipe(
            "zero-gamma",
            "BatchNorm; residual blocks start as the identity",
            "Goyal et al. 2017, arXiv 1706.02677",
            0.1,
            prepare=Part(lambda model, batches: zero_gamma(model)),
            group="Batch normalization and its relatives",
            ablation=True,
        ),
    )
)
