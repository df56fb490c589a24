"""Compare what a model computes in train and in eval mode, on one batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from normkit.inspection.forward import watched, without_dropout
from normkit.inspection.graph import layers
from normkit.inspection.norms import PRODUCERS
from normkit.inspection.probe import Objective, Probe
from normkit.inspection.record import tensor_in, tensors_in
from normkit.instruments.result import Result, axes, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerDiscrepancy:
    """The discrepancy of one layer.

    Attributes:
        layer: Its path in the model.
        output: ``|y_train - y_eval| / |y_train|`` of its output in the whole model, the layers before it included.
        local: The same for the layer alone, both modes on the input it has in train mode: where it is large, a cause.
    """

    layer: str
    output: float
    local: float


@dataclass(frozen=True)
class Discrepancy(Result):
    """Differences between train and eval mode.

    Attributes:
        train_loss: Loss in train mode.
        eval_loss: Loss in eval mode.
        divergence: Mean KL divergence in nats of the predictions in eval mode from those in train mode; None where the
            model's output is not scores of classes, or the batch holds no tensor of integers (classes, tokens) to tell so.
        flips: Share of predictions whose largest score changes; None likewise.
        layers: Every layer, in the order in which they run.
    """

    train_loss: float
    eval_loss: float
    divergence: float | None
    flips: float | None
    layers: tuple[LayerDiscrepancy, ...]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the relative difference per layer."""
        ax = axes(ax)
        names = [found.layer for found in self.layers]
        ax.plot(names, [found.output for found in self.layers], marker="o", label="with the layers before it")
        ax.plot(names, [found.local for found in self.layers], marker="s", label="the layer alone")
        ax.tick_params(axis="x", labelrotation=90)
        return label(ax, f"train loss {self.train_loss:.3g}, eval loss {self.eval_loss:.3g}", "layer", "difference")


def discrepancy(model: nn.Module, objective: Objective, batch: Any, *, dropout: bool = True) -> Discrepancy:
    """Evaluate one batch in train and in eval mode and compare, layer by layer.

    Layers that the user keeps in eval mode inside a model in train mode stay so. The random numbers are the same.

    Args:
        model: Any module, in either mode.
        objective: ``loss = objective(model, batch)``.
        batch: The batch.
        dropout: Whether torch's dropout is active in train mode; without it only the statistics of normalization differ,
            and what a model drops by means of its own.

    Returns:
        The measurement.
    """
    outputs: dict[str, Tensor] = {}
    alone: dict[str, Tensor | None] = {}
    local: dict[str, float] = {}
    scores: list[Tensor | None] = []

    def try_alone(name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        # before the forward, which moves running statistics towards this batch
        if module.training and not getattr(module, "inplace", False) and not isinstance(module, PRODUCERS):
            args, kwargs = inputs
            modes = [(m, m.training) for m in module.modules()]
            module.eval()
            alone[name] = tensor_in(module.forward(*args, **kwargs))
            for part, mode in modes:
                part.training = mode

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        y = tensor_in(output)
        if y is None:
            return
        outputs[name] = y.clone()  # the next layer may work in place
        if (other := alone.pop(name, None)) is not None:
            local[name] = _relative(y, other)

    found: dict[str, float] = {}

    def compare(name: str, _: nn.Module, __: Any, output: Any) -> None:
        y = tensor_in(output)
        if y is not None and name in outputs and outputs[name].shape == y.shape:
            found[name] = _relative(outputs[name], y)

    def predict(_: str, __: nn.Module, ___: Any, output: Any) -> None:
        y = tensor_in(output)
        scores.append(None if y is None else y.clone())

    with Probe(model, objective, batch) as probe:
        if not probe.model.training:
            probe.model.train()
        drops = [(name, m) for name, m in probe.model.named_modules() if isinstance(m, _DropoutNd)]
        seen, root = layers(probe.model) + drops, [("", probe.model)]
        quiet = nullcontext() if dropout else without_dropout(probe.model)
        with quiet, watched(seen, keep, before=try_alone), watched(root, predict):
            train_loss = probe.mean(probe.loss())
        probe.model.eval()
        with watched(seen, compare), watched(root, predict):
            eval_loss = probe.mean(probe.loss())
    integers = [t for t in tensors_in(batch) if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)]
    divergence, flips = _predictions(scores[0], scores[1], integers) if len(scores) == 2 and integers else (None, None)
    order = tuple(LayerDiscrepancy(name, found[name], local.get(name, 0.0)) for name in outputs if name in found)
    return Discrepancy(train_loss, eval_loss, divergence, flips, order)


def _relative(a: Tensor, b: Tensor) -> float:
    size = a.double().norm()
    return ((a.double() - b.double()).norm() / size).item() if size else 0.0


def _predictions(
    train: Tensor | None, evaluation: Tensor | None, targets: Sequence[Tensor]
) -> tuple[float | None, float | None]:
    """KL divergence and flips; the classes are the dimension that targets lack, or the second of maps and the last of others."""
    if train is None or evaluation is None or train.shape != evaluation.shape:
        return None, None
    shape, shapes = train.shape, [t.shape for t in targets]
    second = shape[:1] + shape[2:] in shapes or (shape[:-1] not in shapes and train.ndim > 3)
    dim = 1 if second else -1
    if train.shape[dim] < 2:
        return None, None
    p, q = train.double().log_softmax(dim), evaluation.double().log_softmax(dim)
    divergence = (p.exp() * (p - q)).sum(dim).mean().item()
    return divergence, (train.argmax(dim) != evaluation.argmax(dim)).double().mean().item()
