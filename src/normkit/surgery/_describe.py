"""Describe the normalization layers of a model and where they come from."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from normkit.inspection.norms import features_of, is_batchnorm, is_frozen_norm, is_norm, outputs
from normkit.methods.catalog import TARGETS
from normkit.methods.revisited.revisit import Revision, revision_of
from normkit.methods.weight_standardization.standardize import effects as standardized
from normkit.optim.effect import Effect, effects_of
from normkit.surgery.conversion_state import origin_of


@dataclass(frozen=True)
class LayerDescription:
    """One normalization layer, or its replacement.

    Attributes:
        path: Its path in the model.
        kind: Class of the layer that is there.
        features: Its number of features.
        replaced: Class of the layer it replaced, or None.
        lost: What the replaced layer did or kept that this one does not; empty if nothing, or if nothing was replaced.
        biased: Path of the layer that got a bias in exchange, or None.
        revision: What [`normkit.revisit`][] did to it, or None.
    """

    path: str
    kind: str
    features: int
    replaced: str | None = None
    lost: str = ""
    biased: str | None = None
    revision: Revision | None = None

    def __str__(self) -> str:
        words = f"{self.path or '(the model)'}: {self.kind}({self.features})"
        words += f" in place of {self.replaced}" if self.replaced else ""
        words += f", {self.biased} has a bias instead" if self.biased else ""
        words += f"; {self.lost}" if self.lost else ""
        return words + (f"; {self.revision}" if self.revision else "")


class Description(list[LayerDescription]):
    """The normalization layers of a model, and what its optimizer does to it; prints as a table.

    Attributes:
        effects: How far each part of the method reaches: ``verb``, ``unit``, ``done``, ``left`` (with reasons), ``elements``.
    """

    def __init__(self, layers: Iterable[LayerDescription], effects: Iterable[Effect] = ()) -> None:
        super().__init__(layers)
        self.effects = tuple(effects)

    @property
    def summary(self) -> str:
        """One line: all effects."""
        return "; ".join(map(str, self.effects))

    def __str__(self) -> str:
        cells = [(effect.verb, effect.reach, effect.share) for effect in self.effects]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for effect, row in zip(self.effects, cells, strict=True):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            lines += [f"  left: {path or '(the model)'}: {reason}" for path, reason in effect.left.items()]
        return "\n".join([*lines, *map(str, self)])


def describe(model: nn.Module, optimizer: Optimizer | None = None) -> Description:
    """Describe every normalization layer of ``model``: its kind, the layer that it replaced, and the loss.

    With the optimizer also what a method reaches: how many layers were replaced, how many parameters are trained,
    preconditioned, on the sphere or at a learning rate of their own, and what was left alone and why.

    Args:
        model: Any model.
        optimizer: The optimizer that trains it.

    Returns:
        One description per normalization layer, in the order of ``model.named_modules()``; each prints as a line, all together
        as a table with the ``effects`` of the optimizer.

    Examples:
        >>> from normkit.surgery._convert import convert
        >>> print(*describe(convert(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), "group")))
        1: GroupNorm(4) in place of BatchNorm1d; running statistics are set aside until revert and not saved
        >>> from torch.optim import SGD
        >>> frozen = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        >>> print(describe(frozen, SGD(frozen[1].parameters(), lr=0.1)))
        trained  2 of 4 parameters  8 of 20 values
          left: 0.weight: not in the optimizer
          left: 0.bias: not in the optimizer
        1: BatchNorm1d(4)
    """
    paths = {module: path for path, module in model.named_modules()}
    rows = []
    for layer, path in paths.items():
        origin, kind, revision = origin_of(layer), type(layer).__name__, revision_of(layer)
        if origin is not None:
            biased = None if origin.biased is None else paths.get(origin.biased)
            features, replaced = features_of(origin.module), type(origin.module).__name__
            lost = TARGETS[origin.to].lost
            rows.append(LayerDescription(path, kind, features, replaced, lost, biased, revision))
        elif "normkit_undo" in vars(layer) and is_parametrized(layer):
            used = ", ".join(type(p).__name__ for p in layer.parametrizations.weight)  # pyright: ignore
            rows.append(LayerDescription(path, f"{kind} with {used}", outputs(layer)))  # pyright: ignore
        elif is_norm(layer) or is_frozen_norm(layer):
            rows.append(LayerDescription(path, kind, features_of(layer), revision=revision))
    if optimizer is None:
        return Description(rows)
    return Description(rows, [*_replaced(model, rows), *standardized(model), *effects_of(model, optimizer)])


def _replaced(model: nn.Module, layers: list[LayerDescription]) -> list[Effect]:
    """How many normalization layers were replaced; batch normalizations that stay are the ones left."""
    done = tuple(layer.path for layer in layers if layer.replaced)
    stay = {layer.path: f"stays {layer.kind}" for layer in layers if is_batchnorm(model.get_submodule(layer.path))}
    left = {path: reason for path, reason in stay.items() if path not in done}
    return [Effect("replaced", "normalization layers", done, left)] if done else []
