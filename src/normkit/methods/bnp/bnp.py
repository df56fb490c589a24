"""Batch normalization preconditioning: train a plain network as if its layers' inputs were normalized.

Lange, Helfrich, Ye. "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72), 2022,
arXiv 2108.01110.

The mathematics is in ``normkit.methods.bnp.preconditioning``; here is the state: running statistics of every layer's
input, gathered by forward hooks, and the moment at which gradients are transformed.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.methods.bnp.layers import choose, removed_means
from normkit.methods.bnp.observer import Observed
from normkit.methods.bnp.statistics import Preconditioner, Preconditioners, RowStatistics, restored
from normkit.methods.bnp.transform import LayerStep, Rate, Transform
from normkit.optim.step_hooks import StepHandle, before_step, effective_lr


class BNP:
    """Preconditions the gradients of all linear and convolution layers of a model (arXiv 2108.01110).

    Before each step ``W~ = (G_W - G_b mu^T) / (q^2 s)`` and ``b~ = G_b / q^2 - W~ mu`` take the place of the gradients, with
    running mean mu and guarded variance s of the layer's input, see [`normkit.functional.precondition`][].

    The model is not changed: no layer, no buffer, the plain state_dict, and in eval mode the plain graph. Statistics
    of a step come from exactly the rows whose gradients it uses: all micro-batches, all ranks (one all-reduce per
    step for all layers together), nothing from evaluation.

    Args:
        model: Any module. Every Linear, Conv1-3d and ConvTranspose1-3d is observed; ``skipped`` lists the others.
        decay: Decay of the running statistics per optimizer step; the first steps are averaged evenly.
        eps_relative: Guard of the variances relative to the largest of the layer.
        eps: Absolute guard of the variances.
        layers: Paths of the layers to precondition, default all.
        max_change: Largest change of a unit's output in one step, relative to its spread; None is the paper's form, which
            bounds nothing. For SGD, whose step is the gradient times its rate; 0.05 is a good value, and with it no
            learning rate diverges that batch normalization survives.
        process_group: Ranks that share their statistics, default the world.

    Attributes:
        skipped: Path of each module whose weights are left alone, with the reason.

    Raises:
        ValueError: An option is out of range, a path in ``layers`` is no layer that can be preconditioned, a layer is
            observed by another BNP, or there is nothing to precondition.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = BNP(model).attach(optimizer)
        >>> model(torch.randn(4, 2)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.99,
        eps_relative: float = 1e-2,
        eps: float = 1e-4,
        layers: Iterable[str] | None = None,
        max_change: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if eps_relative < 0 or eps < 0 or eps_relative + eps == 0:
            raise ValueError(
                f"eps_relative and eps must be non-negative and not both zero, got {eps_relative} and {eps}: "
                "the gradients of constant inputs would be divided by zero"
            )
        if max_change is not None and not max_change > 0:
            raise ValueError(f"max_change must be positive or None, got {max_change}")
        self.max_change = max_change
        self._statistics = RowStatistics(decay, eps_relative, eps, process_group)
        self._optimizers: dict[Optimizer, StepHandle] = {}
        self._mask: Tensor | None = None
        self._preconditioners: Preconditioners | None = None
        self._transform = Transform()
        chosen, self.skipped = choose(model, layers)
        norms = removed_means(model, chosen)
        self._layers: list[Observed] = []
        for path, (layer, *sharing) in chosen.items():
            seen = Observed(path, layer, lambda: self._mask)
            seen.norm = norms.get(path)
            for other in sharing:
                seen.share(other)
            self._layers.append(seen)

    def attach(self, optimizer: Optimizer) -> StepHandle:
        """Precondition the gradients of this optimizer's parameters right before each of its steps.

        A closure given to ``step`` is served as well. The running statistics travel in the optimizer's state_dict
        (key ``"bnp"``), so that a resumed run goes on exactly.

        Args:
            optimizer: Any optimizer that steps once per call.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: The optimizer is attached already, evaluates its closure several times (LBFGS), or holds no observed
                weight or sharded ones.
        """
        if optimizer in self._optimizers:
            raise ValueError("the optimizer is attached already; call remove() of the handle of that attach() first")
        attached = self._layers_of(optimizer)
        if not attached:
            raise ValueError(
                "the optimizer holds no weight of a layer that BNP observes; build it from the parameters of this model"
            )
        sharded = next((seen.path for seen in attached if hasattr(seen.weight, "placements")), None)
        if sharded is not None:
            raise ValueError(
                f"{sharded}: its weight is sharded over ranks (fully_shard), and preconditioning needs the whole gradient; "
                "use DistributedDataParallel"
            )
        for seen in attached:
            seen.allocate()

        def prepare() -> None:
            rates = _rates(optimizer)
            layers = [seen for seen in self._layers if id(seen.weight) in rates]
            self._precondition([seen for seen in layers if not seen.prepared], rates)
            for seen in layers:
                seen.prepared = False

        def discard() -> None:
            for seen in self._layers_of(optimizer):
                seen.discard()

        def save(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "bnp": self.state_dict()}

        def load(_: Optimizer, state: dict[str, Any]) -> None:
            if "bnp" in state:
                self.load_state_dict(state["bnp"])

        handle = before_step(optimizer, prepare, discard=discard, owner="BNP")
        hooks = optimizer.register_state_dict_post_hook(save), optimizer.register_load_state_dict_pre_hook(load)
        undo = [handle.remove, *(hook.remove for hook in hooks), lambda: self._forget(optimizer)]
        self._optimizers[optimizer] = StepHandle(undo)
        return self._optimizers[optimizer]

    def precondition_(self) -> None:
        """Precondition the gradients now, by hand: before clipping, say (under AMP after ``scaler.unscale_``).

        The next step of an attached optimizer then leaves them as they are.

        Raises:
            ValueError: ``max_change`` is set and no attached optimizer tells the learning rate.
        """
        rates: dict[int, Rate] = {}
        for optimizer in self._optimizers:
            rates.update(_rates(optimizer))
        self._precondition([seen for seen in self._layers if not seen.prepared], rates if self._optimizers else None)
        for seen in self._layers:
            seen.prepared = True

    @contextmanager
    def masked(self, mask: Tensor) -> Generator[None, None, None]:
        """Count only rows where ``mask`` is True, so that padding does not enter the statistics.

        It concerns the layers whose rows are shaped as the mask, or as the mask flattened. Enclose the forward, and
        with activation checkpointing the backward too.
        """
        previous, self._mask = self._mask, mask.to(torch.bool)
        try:
            yield
        finally:
            self._mask = previous

    def discard(self) -> None:
        """Forget the rows seen since the last step (an attached optimizer's ``zero_grad`` does it)."""
        for seen in self._layers:
            seen.discard()

    def metrics(self) -> list[tuple[Observed, Preconditioner]]:
        """The layers of the latest step, each with what its gradient was preconditioned by."""
        return [] if self._preconditioners is None else self._preconditioners.of_each()

    def remove(self) -> None:
        """Take all hooks off the model and off attached optimizers, which then step on plain gradients."""
        for handle in list(self._optimizers.values()):
            handle.remove()
        for seen in self._layers:
            seen.remove()
        self._layers = []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Running statistics per layer that has seen rows: ``{path: {"mean", "variance", "steps"}}``."""
        names = ("mean", "variance", "steps")
        self._statistics.write_back()
        return {
            seen.path: dict(zip(names, (t.clone() for t in seen.running), strict=True))
            for seen in self._layers
            if seen.running is not None
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the statistics of ``state_dict``; layers it does not name start anew.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: It names a layer that is not observed, or has another shape than the layer.
        """
        paths = {seen.path: seen for seen in self._layers}
        if unknown := sorted(state.keys() - paths.keys()):
            raise ValueError(f"the state holds statistics of {', '.join(unknown)}, which this BNP does not observe")
        for path, entry in state.items():
            seen = paths[path]
            if seen.materialized() and entry["mean"].shape != (seen.geometry.features,):
                raise ValueError(
                    f"{path}: the state has {entry['mean'].numel()} features, the layer {seen.geometry.features}"
                )
        self._statistics.write_back()
        for seen in self._layers:
            entry = state.get(seen.path)
            device = seen.layer.weight.device
            seen.running = None if entry is None else restored(entry, device)

    def __repr__(self) -> str:
        kept = self._statistics
        options = f"decay={kept.decay}, eps_relative={kept.eps_relative}, eps={kept.eps}, max_change={self.max_change}"
        lines = [f"BNP({options})"]
        lines += [f"  {seen.path}: {_rule(seen)}" for seen in self._layers]
        lines += [f"  {path}: left alone: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)

    def _forget(self, optimizer: Optimizer) -> None:
        del self._optimizers[optimizer]

    def _layers_of(self, optimizer: Optimizer) -> list[Observed]:
        trained = _trained(optimizer)
        return [seen for seen in self._layers if id(seen.weight) in trained]

    @torch.no_grad()
    def _precondition(self, layers: Sequence[Observed], rates: Mapping[int, Rate] | None) -> None:
        """Transform the gradients of ``layers``; a bias that is not among the optimizer's parameters is not trained.

        Raises:
            ValueError: A step is to be bounded and its learning rate is not known.
        """
        layers = [seen for seen in layers if seen.materialized()]
        if not layers:
            return
        if self.max_change is not None and rates is None:
            raise ValueError("max_change bounds a step, so it needs the learning rate: attach the optimizer first")
        self._preconditioners = self._statistics.advance(layers)
        steps = []
        for place, seen in enumerate(layers):
            weight, bias = seen.weight, seen.layer._parameters["bias"]
            if weight is not None and weight.grad is not None:
                bias_grad = None if bias is None or (rates is not None and id(bias) not in rates) else bias.grad
                rate = None if rates is None else rates.get(id(weight))
                steps.append(LayerStep(place, weight, weight.grad, bias_grad, rate))
        self._transform(steps, self._preconditioners, self.max_change)


def _rates(optimizer: Optimizer) -> dict[int, Rate]:
    """For each parameter, its ``normkit.optim.step_hooks.effective_lr``."""
    groups = ((effective_lr(optimizer, group), group["params"]) for group in optimizer.param_groups)
    return {id(p): rate for rate, params in groups for p in params}


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _rule(seen: Observed) -> str:
    """What is done with the layer, in words."""
    layer = seen.layer
    if not layer.weight.requires_grad:
        return f"{layer}, frozen: nothing to do"
    if seen.unsupported:
        return f"{layer}, left alone: what its forward takes or gives is no rows of its weight"
    if layer.bias is not None and layer.bias.requires_grad:
        return f"{layer}, centred and scaled"
    if seen.norm is not None:
        return f"{layer}, scaled; the normalization behind it removes the mean"
    return f"{layer}, scaled, with the metric of a layer without bias"
