"""Say what the normalization layers of a model are and where they come from."""

from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from normkit.inspection.norms import features_of, is_norm, outputs
from normkit.methods.catalog import TARGETS
from normkit.methods.revisited.revisit import Revision, revision_of
from normkit.surgery.conversion_state import origin_of


@dataclass(frozen=True)
class LayerDescription:
    """One normalization layer, or what stands in for one.

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


def describe(model: nn.Module) -> list[LayerDescription]:
    """What every normalization layer of ``model`` is, what it replaced and what was lost by it.

    Args:
        model: Any model.

    Returns:
        One description per normalization layer, in the order of ``model.named_modules()``; it prints as a line.

    Examples:
        >>> from normkit.surgery._convert import convert
        >>> print(*describe(convert(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), "group")))
        1: GroupNorm(4) in place of BatchNorm1d; running statistics are kept but neither used nor updated
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
        elif is_norm(layer):
            rows.append(LayerDescription(path, kind, features_of(layer), revision=revision))
    return rows
