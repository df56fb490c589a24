"""Find the weights that matter only through their direction.

A filter whose output goes into a normalization of its own channel, and nowhere else, may be scaled by any positive
number without changing the network's function. Riemannian approach to batch normalization, Minhyung Cho and Jaehyung
Lee, NIPS 2017, arXiv 1709.09603, moves such filters on the sphere.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from normkit.inspection.conformance import scales_with_its_filters
from normkit.inspection.graph import Dataflow, dataflow, works_on_positions
from normkit.inspection.norms import (
    PRODUCERS,
    aligned,
    feature_dim,
    features_of,
    is_norm,
    outputs,
    removes_mean,
    scale_obstacle,
)
from normkit.inspection.probe import Objective, Probe
from normkit.inspection.reads import tensors_read

Rule: TypeAlias = Literal["exact", "paper"]

_PASS = {"contiguous"}
_CONCATENATE = {"cat", "concat", "concatenate"}
# Positively homogeneous, channel by channel: a scale passes through, but a bias behind them is no constant any more.
HOMOGENEOUS = {"relu", "leaky_relu", "dropout", *(f"dropout{d}d" for d in (1, 2, 3))}
HOMOGENEOUS |= {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg") for d in (1, 2, 3)}
HOMOGENEOUS_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)

TOLERANCE = 1e-3
"""Alignment ``|<w, g>| / (|w| |g|)`` up to which a weight counts as invariant: far above what rounding and the epsilon
of a normalization leave, far below the ``1 / sqrt(fan-in)`` of a weight that is not."""


@dataclass(frozen=True)
class Invariance:
    """The scale invariance of one weight.

    Attributes:
        invariant: Whether each of its filters may be scaled without changing the network's function.
        manifold: Whether the rule puts it on the sphere.
        reason: Why, in words.
        norms: Paths of the normalizations it feeds.
        offsets: Channel of each of them at which its filters begin, where channels are concatenated; empty for 0 everywhere.
        alignment: ``|<w, g>| / (|w| |g|)`` over filters (0 where invariant), when it was measured.
    """

    invariant: bool
    manifold: bool
    reason: str
    norms: tuple[str, ...] = ()
    alignment: float | None = None
    offsets: tuple[int, ...] = ()

    @property
    def fed(self) -> tuple[tuple[str, int], ...]:
        """Each normalization, with its channel at which the filters begin."""
        return tuple(zip(self.norms, self.offsets or (0,) * len(self.norms), strict=True))


def scale_invariance(
    model: nn.Module,
    objective: Objective | None = None,
    batch: Any = None,
    *,
    rule: Rule = "exact",
) -> dict[str, Invariance]:
    """Report for each linear and convolution weight whether scaling its filters leaves the network's function unchanged.

    Structure is read first: the layer's output must go into one normalization of each channel on its own, directly or
    through operations that a positive scale passes through (ReLU, pooling, dropout; when the layer has no bias). With
    ``objective`` and ``batch`` one backward pass confirms it, as the gradient of an invariant filter is orthogonal to
    it, and decides for layers whose surroundings cannot be traced. The model is left as it was.

    Args:
        model: Any module. Normalizations in eval mode inside a model in train mode count as frozen.
        objective: ``loss = objective(model, batch)``.
        batch: What the objective understands.
        rule: What goes on the sphere: ``"exact"``, the invariant weights; ``"paper"``, every convolution with fewer
            filters than elements per filter, invariant or not.

    Returns:
        One entry per weight, by parameter name, in the order of the model.

    Raises:
        ValueError: The rule is unknown, only one of ``objective`` and ``batch`` is given, or a layer is lazy and not yet
            initialised.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
        >>> {name: entry.invariant for name, entry in scale_invariance(model).items()}
        {'0.weight': True, '3.weight': False}
    """
    if rule not in ("exact", "paper"):
        raise ValueError(f"rule={rule!r}: choose 'exact' (weights that are invariant) or 'paper' (all convolutions)")
    if (objective is None) != (batch is None):
        raise ValueError("objective and batch measure together: give both, or neither to go by structure alone")
    flow, modules = dataflow(model), dict(model.named_modules())
    read = tensors_read(model, flow)
    report: dict[str, Invariance] = {}
    for name, users in weight_users(model).items():
        verdicts = [_verdict(flow, modules, path, model.training, read) for path in users]
        bad = [verdict for verdict in verdicts if not verdict.invariant]
        entry = bad[0] if bad else verdicts[0]
        if not bad:
            entry = _feeding_only(entry, [pair for verdict in verdicts for pair in verdict.fed])
        report[name] = entry
    if objective is not None:
        report = _confirmed(model, objective, batch, report)
    return {name: replace(entry, manifold=_on_manifold(model, name, entry, rule)) for name, entry in report.items()}


def weight_users(model: nn.Module) -> dict[str, list[str]]:
    """Return the name of each weight and the paths of the layers that use it.

    Raises:
        ValueError: A layer is lazy and not yet initialised.
    """
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    users: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PRODUCERS) and "weight" in module._parameters:
            if is_lazy(module.weight):
                raise ValueError(
                    f"{path or 'the model'}: {type(module).__name__} does not know its features yet; run one batch through "
                    "the model first"
                )
            users.setdefault(names[module._parameters["weight"]], []).append(path)
    return users


def _feeding_only(entry: Invariance, fed: Iterable[tuple[str, int]]) -> Invariance:
    once = tuple(dict.fromkeys(fed))
    offsets = tuple(offset for _, offset in once)
    return replace(entry, norms=tuple(norm for norm, _ in once), offsets=offsets if any(offsets) else ())


def _no(reason: str) -> Invariance:
    return Invariance(False, False, reason)


_UNTRACED = "its surroundings cannot be traced; give objective and batch to measure"


def _verdict(
    flow: Dataflow, modules: dict[str, nn.Module], path: str, training: bool, read: dict[nn.Module, str]
) -> Invariance:
    layer: Any = modules[path]
    if isinstance(layer, _ConvTransposeNd):
        return _no("transposed convolution: its filters are no rows of the weight")
    if layer.weight[0].numel() < 2:
        return _no("one element per filter: nothing but scale")
    if not scales_with_its_filters(layer):
        return _no(f"{type(layer).__name__} has a forward of its own, whose output does not scale with the filters")
    if layer in read:
        return _no(read[layer])
    calls = flow.calls(path)
    if not calls:
        return _no(_UNTRACED)
    found: list[_Fed] = []
    for call in calls:
        behind = _follow(flow, modules, call, layer.bias is None, training)
        if isinstance(behind, str):
            return _no(behind)
        found += behind
    across = works_on_positions(flow, modules, path)
    for norm, part in found:
        if (across and feature_dim(modules[norm]) != -1) or (part is None and not aligned(layer, modules[norm])):
            return _no(f"{norm}: normalizes other channels than the {outputs(layer)} outputs")
    names = ", ".join(dict.fromkeys(norm for norm, _ in found))
    return _feeding_only(Invariance(True, False, f"feeds {names} only"), [(norm, part or 0) for norm, part in found])


_Fed: TypeAlias = tuple[str, int | None]
"""A normalization, and where channels were concatenated the first of its channels that is the layer's."""


def _follow(
    flow: Dataflow,
    modules: dict[str, nn.Module],
    index: int,
    free: bool,
    training: bool,
    part: tuple[int, int] | None = None,
) -> list[_Fed] | str:
    """The normalizations behind step ``index``, or why the scale is not removed; ``part``: first channel, channels in all."""
    norms: list[_Fed] = []
    for consumer in flow.consumers(index):
        step = flow.steps[consumer]
        module = modules.get(step.path or "") if step.name == "module" else None
        passes = step.name in _PASS or type(module) is nn.Identity
        scales = step.name in HOMOGENEOUS or type(module) in HOMOGENEOUS_MODULES
        joined = _joined(flow, modules, consumer, index, part) if step.name in _CONCATENATE else None
        if passes or (scales and free) or joined:
            found = _follow(flow, modules, consumer, free, training, joined or part)
            if isinstance(found, str):
                return found
            norms += found
        elif module is not None and is_norm(module):
            obstacle = _obstacle(module, free, training)
            if obstacle is None and part is not None and (features_of(module) != part[1] or feature_dim(module) != 1):
                obstacle = "what goes into it is not concatenated along its channels"
            if obstacle is not None:
                return f"{step.path}: {obstacle}"
            norms.append((step.path or "", None if part is None else part[0]))
        elif scales:
            return f"its bias goes through {step.path or step.name} before a normalization removes it"
        elif step.name == "add":
            return "goes into a sum before any normalization"
        elif step.name == "output":
            return "reaches the output of the model, or of the part of it that could be traced, without a normalization"
        else:
            kind = type(module).__name__ if module is not None else step.name
            return f"goes through {kind}{f' {step.path}' if step.path else ''} before any normalization"
    return norms or "its output is not used"


def _joined(
    flow: Dataflow, modules: dict[str, nn.Module], join: int, index: int, part: tuple[int, int] | None
) -> tuple[int, int] | None:
    """First channel of ``index``, or of its ``part``, and channels in all, of a concatenation; None where unknown."""
    inputs = flow.steps[join].inputs
    sizes = [_channels(flow, modules, source) for source in inputs]
    if len(inputs) < 2 or None in sizes:
        return None
    known = [size for size in sizes if size is not None]
    return sum(known[: inputs.index(index)]) + (part[0] if part else 0), sum(known)


def _channels(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> int | None:
    """Channels of the output of a step, if they are known."""
    step = flow.steps[index]
    module = modules.get(step.path or "") if step.name == "module" else None
    if isinstance(module, PRODUCERS):
        return outputs(module)
    if module is not None and is_norm(module):
        return features_of(module)
    if step.name in _CONCATENATE:
        sizes = [_channels(flow, modules, source) for source in step.inputs]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    same = step.name in (_PASS | HOMOGENEOUS) or type(module) in (nn.Identity, *HOMOGENEOUS_MODULES)
    return _channels(flow, modules, step.inputs[0]) if same and step.inputs else None


def _obstacle(norm: nn.Module, free: bool, training: bool) -> str | None:
    """Why a normalization does not remove the scale of one channel; ``free`` of a bias or not."""
    obstacle = scale_obstacle(norm)
    if obstacle is not None:
        return obstacle
    if not removes_mean(norm) and not free:
        return f"{type(norm).__name__} leaves the bias of the layer before it in place, which is not scaled along"
    if training and not norm.training and getattr(norm, "running_mean", None) is not None:
        return "frozen: it normalizes by running statistics"
    return None


def _on_manifold(model: nn.Module, name: str, entry: Invariance, rule: Rule) -> bool:
    if rule == "exact":
        return entry.invariant
    weight = model.get_parameter(name)
    owners = [model.get_submodule(path) for path in weight_users(model)[name]]
    convolutions = all(isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd) for layer in owners)
    return convolutions and weight.shape[0] < weight[0].numel()


def _confirmed(
    model: nn.Module, objective: Objective, batch: Any, report: dict[str, Invariance]
) -> dict[str, Invariance]:
    """The report after one backward pass: structure denied where alignment is large, the untraced decided by it."""
    weights = {name: weight for name in report if (weight := model.get_parameter(name)).requires_grad}
    if not weights:
        return report
    with Probe(model, objective, batch) as probe, _feeding(model) as fed:
        if not model.training:
            model.train()  # a normalization in eval mode removes no scale; the probe restores all flags
        _, gradients = probe.gradients(list(weights.values()))
    confirmed = dict(report)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if not gradient.any():
            continue
        w, g = weight.detach().flatten(1).double(), gradient.flatten(1).double()
        alignment = float((w * g).sum(1).norm() / (w.norm(dim=1) * g.norm(dim=1)).norm())
        measured = f"|<w, g>| / (|w||g|) = {alignment:.0e}"
        entry = replace(report[name], alignment=alignment)
        if entry.invariant and alignment > TOLERANCE:
            entry = replace(entry, invariant=False, reason=f"{entry.reason}, but {measured}")
        elif entry.reason == _UNTRACED:
            entry = replace(entry, invariant=alignment <= TOLERANCE, reason=f"not traced; measured {measured}")
            if entry.invariant:
                entry = replace(entry, norms=tuple(fed.get(weight, ())), offsets=())
        confirmed[name] = entry
    return confirmed


@contextmanager
def _feeding(model: nn.Module) -> Generator[dict[Tensor, dict[str, None]], None, None]:
    """Watch which normalizations take a layer's output as it is: weight -> paths, filled by forward passes inside.

    Yields:
        The table.
    """
    table: dict[Tensor, dict[str, None]] = {}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}  # the output is kept alive, so that its id stays its own

    def produced(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_tensor(output):
            outputs[id(output)] = (layer.weight, output)  # pyright: ignore[reportArgumentType]

    def taken(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(norm: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in outputs:
                table.setdefault(outputs[id(args[0])][0], {})[path] = None

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, PRODUCERS):
            handles.append(module.register_forward_hook(produced))
        elif is_norm(module):
            handles.append(module.register_forward_pre_hook(taken(path)))
    try:
        yield table
    finally:
        for handle in handles:
            handle.remove()
