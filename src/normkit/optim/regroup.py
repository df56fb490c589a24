"""Keep an optimizer in step with a model whose parameters come and go."""

from torch import nn
from torch.optim import Optimizer


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Make sure that ``optimizer`` has to do with ``model``.

    Raises:
        ValueError: It holds none of the model's parameters.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"optimizer: this {type(optimizer).__name__} holds no parameter of the model; pass the one that trains it"
        )


def regroup(optimizer: Optimizer, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter]) -> None:
    """Let ``optimizer`` hold the parameters that the model has now.

    Parameters that left the model are dropped with their state; state stays with every parameter that lives on. New
    ones that require a gradient go to the group of their layer's other parameters (those that it has or had), else
    to that of the nearest parameter in the model.

    Args:
        optimizer: Any optimizer; its groups are changed in place.
        before: The model's named parameters before the change.
        now: And after it.
    """
    known, alive = set(before.values()), set(now.values())
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    newcomers = [(name, p) for name, p in now.items() if p not in known and p.requires_grad]
    homes = [_home(name, before, now, group_of) for name, _ in newcomers]
    for gone in known - alive:
        optimizer.state.pop(gone, None)
    for group in optimizer.param_groups:
        keep = [i for i, p in enumerate(group["params"]) if p in alive or p not in known]
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in keep]
    for (name, parameter), group in zip(newcomers, homes, strict=True):
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)


def _home(
    name: str, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter], group_of: dict[nn.Parameter, dict]
) -> dict:
    layer, order = name.rpartition(".")[0], list(now)
    siblings = [p for names in (now, before) for n, p in names.items() if n.rpartition(".")[0] == layer]
    at = order.index(name)
    nearest = [now[order[i]] for i in sorted(range(len(order)), key=lambda i: abs(i - at))]
    return next(group_of[p] for p in (*siblings, *nearest, *group_of) if p in group_of)
