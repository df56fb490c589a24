"""Describe how much of a model a method reaches: which layers or parameters it changes, which it leaves, and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normkit.optim.param_groups import parameter_kinds
from normkit.optim.step_hooks import attachments


@dataclass(frozen=True)
class Effect:
    """The effect of one part of a method.

    Attributes:
        verb: What it does: "preconditioned".
        unit: To what: "modules with weights".
        done: Paths of the layers, or names of the parameters, that it reaches.
        left: Path or name of each that it does not reach, with the reason.
        elements: Trainable elements that it reaches, and those in all; None where elements do not matter.
    """

    verb: str
    unit: str
    done: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    elements: tuple[int, int] | None = None

    @property
    def little(self) -> bool:
        """Whether it reaches less than half, of the units and of their elements."""
        reached, total = self.elements or (0, 1)
        return len(self.done) < len(self.left) and 2 * reached < total

    @property
    def reach(self) -> str:
        """Its reach, in words."""
        return f"{len(self.done)} of {len(self.done) + len(self.left)} {self.unit}"

    @property
    def share(self) -> str:
        """Its share of the elements, in words; empty where elements do not matter."""
        return "" if self.elements is None else f"{self.elements[0]:,} of {self.elements[1]:,} values"

    def __str__(self) -> str:
        return f"{self.reach} {self.verb}" + (f" ({self.share})" if self.share else "")


def count(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements of the tensors; a lazy one has none yet."""
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


def trained_elements(modules: Iterable[nn.Module]) -> int:
    """Return the number of trainable elements that the modules themselves hold, shared ones counted once."""
    return count({p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad})


def effects_of(model: nn.Module, optimizer: Optimizer) -> list[Effect]:
    """Return the effects on ``model`` of ``optimizer`` and its attachments: first the training, then a method's.

    An optimizer of a method, and the owner of an attachment, say so themselves in a method ``effects(model)``.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    left = {name: "not in the optimizer" for name, p in trainable.items() if id(p) not in held}
    done = tuple(name for name in trainable if name not in left)
    values = count(trainable[name] for name in done), count(trainable.values())
    found = [Effect("trained", "parameters", done, left, values)]
    found += _own_rates(model, optimizer)
    sources: list[Any] = [optimizer, *(handle.owner for handle in attachments(optimizer))]
    for source in sources:
        if hasattr(source, "effects"):
            found += source.effects(model)
    return found


def _own_rates(model: nn.Module, optimizer: Optimizer) -> list[Effect]:
    """Whether the parameters for which a method wants another learning rate have it."""
    if any("lr" not in group for group in optimizer.param_groups):
        return []
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters()}
    kinds = {p: factor for p, (_, factor) in parameter_kinds(model).items() if p.requires_grad and id(p) in rates}
    common = {rates[id(p)] for p, factor in kinds.items() if factor == 1}
    marked = {p: factor for p, factor in kinds.items() if factor != 1}
    if not marked or not common:
        return []
    left: dict[str, Any] = {}
    for p, factor in marked.items():
        rate = rates[id(p)]
        if not any(abs(rate - factor * other) <= 1e-6 * abs(rate) for other in common):
            left[names[p]] = (
                f"its learning rate is {rate:g} and should be {factor:g} times the others' ({max(common):g}); build the "
                "optimizer from normkit.param_groups(model, lr=...)"
            )
    done = tuple(names[p] for p in marked if names[p] not in left)
    return [Effect("at the learning rate of the method", "marked parameters", done, left)]
