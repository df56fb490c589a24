"""Find the ends of residual branches and the linear layers that make the output, from the data flow."""

from torch import nn

from normkit.inspection.graph import Dataflow, dataflow
from normkit.inspection.norms import PRODUCERS, is_norm

_PASSES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def branch_ends(model: nn.Module, flow: Dataflow | None = None) -> list[str]:
    """Return the paths of the normalization, linear or convolution layers that end a residual branch.

    Of the tensors that an addition joins, the branch is the one with most linear and convolutional layers since they
    parted; where two have equally many, the sum is no residual block. Identities and dropout behind the last layer are
    skipped. The end of a projection shortcut is not meant.

    Args:
        model: Any module.
        flow: Its data flow, when it is known already.

    Returns:
        Paths in the order of execution, each once.
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
        if weights[0] == weights[1] or path not in modules or path in found:
            continue
        if is_norm(modules[path]) or isinstance(modules[path], PRODUCERS):
            found.append(path)
    return found


def _skip(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> int:
    """The step whose output reaches step ``index`` through identities and dropout alone."""
    while isinstance(modules.get(flow.steps[index].path or ""), _PASSES) and flow.steps[index].inputs:
        index = flow.steps[index].inputs[0]
    return index


def classifiers(model: nn.Module, flow: Dataflow | None = None) -> list[nn.Linear]:
    """Return the linear layers whose output reaches the model's output without passing another layer with weights.

    Args:
        model: Any module. Of one that traces only in parts, the last linear layer is taken.
        flow: Its data flow, when it is known already.

    Returns:
        Usually one layer; none where the output comes from convolutions.

    Examples:
        >>> classifiers(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(-1)))
        [Linear(in_features=3, out_features=2, bias=True)]
    """
    flow = dataflow(model) if flow is None else flow
    modules = dict(model.named_modules())
    ends = [index for index, step in enumerate(flow.steps) if step.name == "output"]
    if len(ends) != 1:
        return [m for m in modules.values() if isinstance(m, nn.Linear)][-1:]
    found: dict[nn.Linear, None] = {}
    pending, seen = list(ends), set(ends)
    while pending:
        for index in flow.steps[pending.pop()].inputs:
            layer = modules.get(flow.steps[index].path or "")
            if isinstance(layer, nn.Linear):
                found[layer] = None
            elif not isinstance(layer, PRODUCERS) and index not in seen:
                pending.append(index)
                seen.add(index)
    return list(found)
