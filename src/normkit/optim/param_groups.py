"""Typed parameter groups for any torch optimizer: what a parameter *is* decides its learning rate and weight decay.

A parameter's kind comes from the type of the module that owns it (subclasses included), never from its name or its
number of dimensions: a ``(1, n)`` linear weight is a weight, a one-dimensional parameter of an unknown module no norm.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from normkit.inspection.conformance import linear_map
from normkit.inspection.norms import statistics_of
from normkit.inspection.probe import Objective
from normkit.optim.invariance import Invariance, Rule, scale_invariance
from normkit.optim.unit_filters import normalize_filters

Kind: TypeAlias = Literal["weights", "biases", "norm-scales", "norm-shifts", "other"]

# A parameter shared by modules of different types takes the first kind of this list; only the last is decayed.
KINDS: tuple[Kind, ...] = ("norm-scales", "norm-shifts", "biases", "other", "weights")

_LINEAR_MAPS = (nn.Linear, nn.Bilinear, _ConvNd)


LR_MARK = "normkit_revision"
"""Attribute of a module whose ``lr_factors``, by parameter name, multiply the learning rate of its own parameters."""


def own_kinds(module: nn.Module) -> dict[str, Kind]:
    """Return the kind of each parameter that ``module`` itself (not its children) declares.

    Weights of linear and convolution layers, recurrent layers and attention projections are ``weights``; their biases
    ``biases``; scale and shift of torch's and our normalization layers ``norm-scales`` and ``norm-shifts``. All else is
    ``other``: embeddings, PReLU, class tokens, layer scales, every parameter of a module whose type is unknown.

    Examples:
        >>> own_kinds(nn.Linear(3, 1)), own_kinds(nn.BatchNorm1d(3)), own_kinds(nn.PReLU())
        ({'weight': 'weights', 'bias': 'biases'}, {'weight': 'norm-scales', 'bias': 'norm-shifts'}, {'weight': 'other'})
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    known: dict[str, Kind] = {}
    if statistics_of(module) != "none":
        known = {"weight": "norm-scales", "bias": "norm-shifts"}
    elif isinstance(module, _LINEAR_MAPS) or linear_map(module):
        known = {"weight": "weights", "bias": "biases"}
    elif isinstance(module, nn.MultiheadAttention):
        known = dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), "weights")
        known |= dict.fromkeys(("in_proj_bias", "bias_k", "bias_v"), "biases")
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        # Both types document their attributes as weight_{ih,hh,hr}* and bias_{ih,hh}*, one per layer and direction.
        known = {name: "weights" if name.startswith("weight_") else "biases" for name in own}
    kinds: dict[str, Kind] = {name: known.get(name, "other") for name in own}
    parametrizations = getattr(module, "parametrizations", {})
    for name, parametrization in parametrizations.items() if isinstance(parametrizations, nn.ModuleDict) else ():
        # One tensor behind a parametrization (spectral or orthogonal) is what it parametrizes; the magnitude and the
        # direction of a weight normalization are not, and decay on them means something else.
        if isinstance(parametrization, ParametrizationList) and hasattr(parametrization, "original"):
            kinds[f"parametrizations.{name}.original"] = known.get(name, "other")
    return kinds


def parameter_kinds(model: nn.Module) -> dict[nn.Parameter, tuple[Kind, float]]:
    """Return kind and learning-rate factor of every parameter, each once, in the order of ``model.parameters()``.

    A parameter shared between modules takes the most careful of its kinds (see ``KINDS``) and the smallest factor.
    """
    claims: dict[nn.Parameter, list[tuple[Kind, float]]] = {}
    for module in model.modules():
        if isinstance(module, ParametrizationList) and hasattr(module, "original"):
            continue  # counted with the module whose tensor it parametrizes
        own: dict[str, float] = getattr(vars(module).get(LR_MARK), "lr_factors", {})
        for name, kind in own_kinds(module).items():
            factor = own.get(name, 1.0)
            claims.setdefault(module.get_parameter(name), []).append((kind, factor))
    found: dict[nn.Parameter, tuple[Kind, float]] = {}
    for parameter in model.parameters():
        kinds, factors = zip(*claims.get(parameter, [("other", 1.0)]), strict=True)
        found[parameter] = (min(kinds, key=KINDS.index), min(factors))
    return found


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    manifold_lr: float | None = None,
    rule: Rule | Mapping[str, Invariance] = "exact",
    objective: Objective | None = None,
    batch: Any = None,
) -> list[dict[str, Any]]:
    """Sort parameters into typed groups: weights decay; biases, norms and everything unknown do not.

    Every parameter stands in exactly one group, shared ones once. Frozen parameters (``requires_grad=False``) are
    kept: an optimizer passes over parameters without a gradient, and one unfrozen later then trains. Where a method
    asks for a learning rate of its own (see [`normkit.revisit`][]), the parameters stand in a group of that rate,
    named after the factor. The rates keep their ratio under every scheduler that multiplies them; ``OneCycleLR`` and
    ``CyclicLR`` set absolute rates: give them ``max_lr=[group["lr"] for group in optimizer.param_groups]``.

    A layer that computes ``x W^T + b`` or ``x W + b`` counts as linear whatever its type (PyTorch Geometric's Linear, the
    Conv1D of transformers). Unknown is treated with care: a parameter of any other module that is no torch layer is in the
    group ``other`` and not decayed. If it should be, set that group's ``weight_decay``.

    With ``manifold_lr`` weights whose scale does not matter stand in a group of that rate with ``manifold=True``, for
    [`normkit.SGDG`][] and [`normkit.AdamG`][]. Their filters are brought to length 1 here, and the running
    statistics behind them scaled along, so that the network's function stays; a warning names the weights for which it
    cannot (``rule="paper"`` puts such weights on the sphere too).

    Args:
        model: Any module.
        lr: Learning rate.
        weight_decay: Weight decay of the group ``weights``.
        manifold_lr: Learning rate of weights on the sphere; None puts none there.
        rule: Which weights those are, see [`normkit.scale_invariance`][]; or its report, made before the model was
            sharded (which hides its structure), or with ``manifold`` as you want it.
        objective: ``loss = objective(model, batch)``, to measure the invariance of what cannot be traced.
        batch: What the objective understands.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``, for any torch optimizer; empty ones are left out.

    Raises:
        ValueError: The rule is unknown, a filter that belongs on the sphere has length zero, or a layer is lazy and not yet
            initialised.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
        >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in param_groups(model, lr=0.1, weight_decay=5e-4)]
        [('weights', 1, 0.0005), ('biases', 1, 0.0), ('norm-scales', 1, 0.0), ('norm-shifts', 1, 0.0)]
    """
    on_sphere: set[nn.Parameter] = set()
    if manifold_lr is not None:
        report = rule if isinstance(rule, Mapping) else scale_invariance(model, objective, batch, rule=rule)
        normalize_filters(model, report)
        on_sphere = {model.get_parameter(name) for name, entry in report.items() if entry.manifold}
    groups: dict[tuple[Kind, float, bool], dict[str, Any]] = {}
    for parameter, (kind, factor) in parameter_kinds(model).items():
        manifold = parameter in on_sphere
        key = (kind, factor, manifold)
        if key not in groups:
            name = "sphere" if manifold else kind
            groups[key] = {
                "params": [],
                "lr": (manifold_lr if manifold and manifold_lr is not None else lr) * factor,
                "weight_decay": weight_decay if kind == "weights" and not manifold else 0.0,
                "name": name if factor == 1 else f"{name} (lr x {factor:g})",
            }
            if manifold_lr is not None:
                groups[key]["manifold"] = manifold
        groups[key]["params"].append(parameter)
    return list(groups.values())


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Check that ``optimizer`` holds parameters of ``model``.

    Raises:
        ValueError: It is no optimizer, or holds none of the model's parameters.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is {optimizer!r}; give the torch optimizer that trains the model")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"optimizer: this {type(optimizer).__name__} holds no parameter of the model; pass the one that trains it"
        )


def regroup(optimizer: Optimizer, before: dict[str, nn.Parameter], now: dict[str, nn.Parameter]) -> None:
    """Update ``optimizer`` to hold the model's present parameters.

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
