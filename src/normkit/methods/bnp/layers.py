"""Which layers of a model BNP can precondition, and why it leaves the others alone."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.inspection.conformance import computes_as_its_type, linear_map
from normkit.inspection.counting import input_counters
from normkit.inspection.graph import dataflow, producers
from normkit.inspection.norms import PRODUCERS, NormTraits
from normkit.inspection.reads import tensors_read
from normkit.methods.bnp.observer import Layer, Observed

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, NormTraits)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def choose(model: nn.Module, layers: Iterable[str] | None = None) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The layers to precondition, and the modules with weights that are left alone.

    Args:
        model: Any module.
        layers: Paths to choose from, default all.

    Returns:
        ``{path: [layer, layers that share its weight and bias]}`` and ``{path: reason}``.

    Raises:
        ValueError: A path in ``layers`` cannot be preconditioned, a layer is observed already, or nothing is left.
    """
    modules = dict(model.named_modules())
    inside_attention = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    holders: dict[int, list[nn.Module]] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)

    read = tensors_read(model, dataflow(model))
    groups: dict[int, list[Layer]] = {}
    chosen: dict[str, list[Layer]] = {}
    skipped: dict[str, str] = {}
    for path, module in modules.items():
        if id(module) in inside_attention or isinstance(module, _NORMS):
            continue
        reason = _obstacle(module, holders, read)
        if reason:
            skipped[path] = reason
        elif isinstance(module, PRODUCERS):
            key = id(module.weight)
            if key not in groups:
                groups[key] = chosen[path] = []
            groups[key].append(module)
    if layers is not None:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        for path in wanted:
            if path not in chosen:
                raise ValueError(f"layers: {path!r} cannot be preconditioned: {_why_not(path, modules, skipped)}")
        chosen = {path: chosen[path] for path in wanted}
    if not chosen:
        few = [f"; {path}: {reason}" for path, reason in skipped.items()][:5]
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise ValueError(
            f"{type(model).__name__} has no linear or convolution layer that can be preconditioned{''.join(few)}{more}"
        )
    for path, found in chosen.items():
        observers = (c for layer in found for c in input_counters(layer) if isinstance(c, Observed))
        if any(not observer.collector.copied for observer in observers):
            raise ValueError(
                f"{path}: another BNP observes this layer; call its remove() first (normkit.handle(optimizer) "
                "returns the one that normkit.apply attached to its optimizer)"
            )
    return chosen, skipped


def _obstacle(module: nn.Module, holders: Mapping[int, list[nn.Module]], read: Mapping[nn.Module, str]) -> str:
    """Why the weights of ``module`` cannot be preconditioned, or an empty string."""
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention uses its weights without calling its layers, so their inputs cannot be seen"
    if isinstance(module, _RECURRENT):
        return f"the inputs of {type(module).__name__}'s recurrent weights stay inside its kernel"
    if not isinstance(module, PRODUCERS):
        kind = linear_map(module)
        if kind is not None:
            stored = "" if kind == "rows" else ", and keeps its weight transposed"
            return f"{type(module).__name__} is a linear layer but no torch.nn.Linear{stored}; replace it by one"
        own = any(p is not None for p in module._parameters.values())
        return f"{type(module).__name__} is not a linear or convolution layer" if own else ""
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (parametrization, weight norm, pruning)"
    weight = cast("Tensor", module.weight)
    if weight.is_complex():
        return "its weight is complex"
    if isinstance(module, PRODUCERS) and not computes_as_its_type(module):
        return (
            f"{type(module).__name__} transforms its weight or its output: it does not compute what torch's layer would"
        )
    if module in read:
        return read[module]
    for parameter in (weight, module.bias):
        for other in holders[id(parameter)] if parameter is not None else ():
            if (
                other.__dict__["_parameters"].get("weight") is not weight
                or other._parameters.get("bias") is not module.bias
            ):
                return f"it shares a parameter with a {type(other).__name__} that is used otherwise"
            if type(other) is not type(module):
                return f"it shares its weight with a {type(other).__name__}"
    return ""


def _why_not(path: str, modules: Mapping[str, nn.Module], skipped: Mapping[str, str]) -> str:
    if path not in modules:
        return "the model has no such module"
    return skipped.get(
        path, f"{type(modules[path]).__name__} holds no weight of its own, or shares that of another layer"
    )


def removed_means(model: nn.Module, chosen: Mapping[str, list[Layer]]) -> dict[str, nn.Module]:
    """For layers without bias: the normalization that alone takes their output and removes the mean of each unit."""
    modules = dict(model.named_modules())
    norms = any(isinstance(m, (_BatchNorm, _InstanceNorm)) for m in modules.values())
    if not norms or all(layer.bias is not None for found in chosen.values() for layer in found):
        return {}
    return {
        source: modules[norm]
        for norm, source in producers(model).items()
        if source in chosen and len(chosen[source]) == 1 and isinstance(modules[norm], (_BatchNorm, _InstanceNorm))
    }
