"""Name the faulty layers of a model in plain words, with evidence and remedy."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.inspection.probe import Objective
from normkit.instruments._doctor.checks import DISEASES, Finding
from normkit.instruments._doctor.examination import examine
from normkit.instruments.result import plain


@dataclass(frozen=True)
class Diagnosis:
    """Findings of the doctor; ``print`` shows them.

    Attributes:
        findings: The diseases, the worst first.
        layers: Number of normalization layers examined.
    """

    findings: tuple[Finding, ...]
    layers: int

    @property
    def healthy(self) -> bool:
        """Whether there is no fault; advice does not count."""
        return not any(finding.severity == "sick" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-ready data."""
        return {"healthy": self.healthy, **plain(self)}

    def __str__(self) -> str:
        verdict = "healthy" if self.healthy else "not healthy"
        return "\n\n".join([
            f"{verdict}: {self.layers} normalization layer{'' if self.layers == 1 else 's'} examined",
            *map(str, self.findings),
        ])


def doctor(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Any],
    *,
    optimizer: Optimizer | None = None,
    accumulate: int = 1,
) -> Diagnosis:
    """Examine a model and name what is wrong with its normalization, layer by layer.

    The batch's statistics are examined in train mode with dropout off, whatever mode the model is in; layers that are
    kept in eval mode inside a model in train mode stay so. The model is left as it was. Wrapped in
    ``DistributedDataParallel``, all ranks must call it.

    Args:
        model: Any module.
        objective: ``loss = objective(model, batch)``.
        batches: Training batches as in training; at most eight are looked at, four or more show how they differ.
        optimizer: The optimizer, for advice about weight decay.
        accumulate: Micro-batches per optimizer step.

    Returns:
        The diagnosis.

    Raises:
        ValueError: There is no batch, or ``accumulate`` is less than 1.

    Examples:
        >>> import torch
        >>> sick = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
        >>> found = doctor(sick, lambda model, x: model(x).mean(), [torch.randn(1, 2)])
        >>> found.healthy, found.findings[0].disease, list(found.findings[0].layers)
        (False, 'one value per channel', ['1'])
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; it counts micro-batches per step and must be at least 1")
    seen = examine(model, objective, batches, optimizer=optimizer, accumulate=accumulate)
    findings = [finding for disease in DISEASES if (finding := disease(seen)) is not None]
    findings.sort(key=lambda finding: finding.severity != "sick")
    return Diagnosis(tuple(findings), len(seen.norms))
