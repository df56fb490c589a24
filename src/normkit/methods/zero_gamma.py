"""Residual blocks that start as the identity: the last normalization of each block begins with scale zero.

Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, Priya Goyal, Piotr Dollár, Ross Girshick and others,
arXiv 1706.02677.
"""

import torch
from torch import Tensor, nn

from normkit.inspection.graph import PRODUCERS, Dataflow, dataflow, is_norm

_PASSES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def last_norms(model: nn.Module, flow: Dataflow | None = None) -> list[str]:
    """Paths of the normalization layers whose output ends the residual branch of a block.

    Of the tensors that an addition joins, the branch is the one with most linear and convolutional layers since they
    parted; where two have equally many, the sum is no residual block. So the normalization in a projection shortcut is
    not meant.

    Args:
        model: Any module.
        flow: Its data flow, when it is known already.

    Returns:
        Paths in the order of execution.
    """
    flow = dataflow(model) if flow is None else flow
    modules = dict(model.named_modules())
    before = flow.ancestors
    found: list[str] = []
    for step in flow.steps:
        if step.name != "add" or len(step.inputs) != 2:
            continue
        ends = [_skip(flow, modules, index) for index in step.inputs]
        own = [(before[a] | {a}) - (before[b] | {b}) for a, b in (step.inputs, step.inputs[::-1])]
        weights = [sum(isinstance(modules.get(flow.steps[i].path or ""), PRODUCERS) for i in s) for s in own]
        path = flow.steps[ends[weights.index(max(weights))]].path
        if weights[0] != weights[1] and path in modules and is_norm(modules[path]) and path not in found:
            found.append(path)
    return found


def _skip(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> int:
    """The step whose output reaches step ``index`` through identities and dropout alone."""
    while isinstance(modules.get(flow.steps[index].path or ""), _PASSES) and flow.steps[index].inputs:
        index = flow.steps[index].inputs[0]
    return index


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
