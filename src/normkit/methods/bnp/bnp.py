"""Batch normalization preconditioning: train a plain network as if its layers' inputs were normalized.

Lange, Helfrich, Ye. "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72), 2022,
arXiv 2108.01110.

The mathematics is in ``normkit.methods.bnp.preconditioning``; here is the state: running statistics of every layer's
input, gathered by forward hooks, and the moment at which gradients are transformed.
"""

import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.inspection.counting import Collector
from normkit.inspection.norms import PRODUCERS
from normkit.methods.bnp.layers import choose, removed_means
from normkit.methods.bnp.observer import Mask, Observed, Statistics
from normkit.methods.bnp.statistics import Preconditioner, Preconditioners, RowStatistics, restored
from normkit.methods.bnp.transform import LayerStep, Rate, Transform
from normkit.methods.method import ZERO_RESIDUAL, Method, Part, Recipe, adam
from normkit.optim.effect import Effect, trained_elements
from normkit.optim.step_hooks import StepHandle, attach_to_step, attachments, check_attachable, effective_lr

_logger = logging.getLogger("normkit")

_LATE = "it came into the model after BNP(model), which does not observe it"
_UNSUPPORTED = "what its forward takes or gives is no rows of its weight"


class BNP:
    """Preconditions the gradients of all linear and convolution layers of a model (arXiv 2108.01110).

    Before each step ``W~ = (G_W - G_b mu^T) / (q^2 s)`` and ``b~ = G_b / q^2 - W~ mu`` take the place of the gradients, with
    running mean mu and guarded variance s of the layer's input, see [`normkit.functional.precondition`][].

    The model is not changed: no layer, no buffer, the plain state_dict, and in eval mode the plain graph. Statistics
    of a step come from exactly the rows whose gradients it uses: all micro-batches, all ranks (one all-reduce per
    step for all layers together), nothing from evaluation.

    Args:
        model: Any module. Every Linear, Conv1-3d and ConvTranspose1-3d is observed; ``skipped`` lists the others.
        decay: Decay of the running statistics per optimizer step.
        statistics: Whose mean and variance a convolution's are: of its ``patches``, the rows that its weights multiply
            (padded and inserted zeros among them, positions at the border in fewer patches), or of its input's ``channels``.
        pooled: Whether running statistics are those of all rows: the first steps averaged evenly, the variance between steps
            included. False is the published form as recalled: start at mean 0 and variance 1, variance within a step only.
        eps_relative: Guard of the variances relative to the largest of the layer.
        eps: Absolute guard of the variances.
        layers: Paths of the layers to precondition, default all.
        max_change: Largest change of a unit's output in one step, relative to its deviation; None is the paper's form, which
            bounds nothing. For SGD, whose step is the gradient times its rate; the recipes ``bnp`` and ``group+bnp`` use 0.05.
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
        statistics: Statistics = "patches",
        pooled: bool = True,
        eps_relative: float = 1e-2,
        eps: float = 1e-4,
        layers: Iterable[str] | None = None,
        max_change: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if statistics not in ("patches", "channels"):
            raise ValueError(f"statistics={statistics!r}: choose 'patches' or 'channels'")
        if eps_relative < 0 or eps < 0 or eps_relative + eps == 0:
            raise ValueError(
                f"eps_relative and eps must be non-negative and not both zero, got {eps_relative} and {eps}: "
                "the gradients of constant inputs would be divided by zero"
            )
        if max_change is not None and not max_change > 0:
            raise ValueError(f"max_change must be positive or None, got {max_change}")
        self.max_change, self.statistics = max_change, statistics
        self._statistics = RowStatistics(decay, pooled, eps_relative, eps, process_group)
        self._handles: list[StepHandle] = []
        self._known = [m for m in model.modules() if isinstance(m, PRODUCERS)]
        self._said_eval_mode = False
        self._given: dict[int, Tensor] = {}  # by id, the parameters that attached optimizers are known to hold
        self._mask = Mask()
        self._collector = Collector("BNP", "call normkit.BNP(model).attach(optimizer)")
        self._preconditioners: Preconditioners | None = None
        self._transform = Transform()
        chosen, self.skipped = choose(model, layers)
        norms = removed_means(model, chosen)
        self._layers: list[Observed] = []
        for path, (layer, *sharing) in chosen.items():
            observed = Observed(path, layer, self._collector, self._mask, statistics)
            observed.norm = norms.get(path)
            for other in sharing:
                observed.watch(other)
            self._layers.append(observed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._given = {id(p): p for p in self._given.values()}
        self._collector.claim()  # the rows of a model that was copied together with this

    def attach(self, optimizer: Optimizer) -> StepHandle:
        """Precondition the gradients of this optimizer's parameters right before each of its steps.

        A closure given to ``step`` is served as well. The running statistics travel in the optimizer's state_dict
        (key ``"bnp"``), so that a run resumes exactly.

        Args:
            optimizer: Any optimizer that steps once per call.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: The optimizer is attached to this or another BNP already, or another one with the same weights is; it
                evaluates its closure several times (LBFGS), works on two gradients per step (SAM), or is no torch optimizer; it
                holds no observed weight or sharded ones.
        """
        check_attachable(optimizer, "bnp")
        attached = self._layers_of(optimizer)
        if any(isinstance(handle.owner, BNP) for handle in attachments(optimizer)):
            raise ValueError(
                "the optimizer is attached already; call normkit.handle(optimizer).remove() first (one BNP serves several "
                "models: normkit.BNP(nn.ModuleList([a, b])).attach(optimizer))"
            )
        if not attached:
            raise ValueError(
                "the optimizer holds no weight of a layer that BNP observes; build it from the parameters of this model"
            )
        others = {id(other.weight): handle for handle in self._handles for other in self._layers_of(handle.optimizer)}
        twice = next((observed for observed in attached if id(observed.weight) in others), None)
        if twice is not None:
            other = type(others[id(twice.weight)].optimizer).__name__
            raise ValueError(
                f"{twice.path}: its weight is attached already, to another optimizer ({other}), and its gradient would be "
                "preconditioned twice; call remove() of the handle of that attach() first"
            )
        sharded = next((observed.path for observed in attached if hasattr(observed.weight, "placements")), None)
        if sharded is not None:
            raise ValueError(
                f"{sharded}: its weight is sharded over ranks (fully_shard), and preconditioning needs the whole gradient; "
                "use DistributedDataParallel"
            )
        handle = attach_to_step(
            optimizer,
            "bnp",
            self._before_step,
            discard=self._on_zero_grad,
            state=self,
            on_remove=self._forget,
            owner=self,
        )
        self._given |= {id(p): p for p in _parameters(optimizer)}
        for observed in attached:
            observed.allocate()
        self._handles.append(handle)
        return handle

    def precondition_(self, optimizer: Optimizer | None = None) -> None:
        """Precondition the gradients now, by hand: before clipping, say (under AMP after ``scaler.unscale_``).

        The next step of an attached optimizer then leaves them as they are, unless a backward pass adds to them.

        Args:
            optimizer: Whose gradients, where several optimizers are attached.

        Raises:
            ValueError: ``max_change`` is set and no attached optimizer tells the learning rate; several optimizers are attached
                and none is given; the given one is not attached.
        """
        attached = [handle.optimizer for handle in self._handles]
        if len(attached) > 1 and optimizer is None:
            raise ValueError("precondition_: several optimizers are attached; give the one that is about to step")
        if optimizer is not None and optimizer not in attached:
            raise ValueError(
                f"precondition_: this {type(optimizer).__name__} is not attached; call attach(optimizer) first"
            )
        rates = _rates(attached[0] if optimizer is None else optimizer) if attached else None
        layers = self._layers if optimizer is None else self._layers_of(optimizer)
        self._precondition([observed for observed in layers if not observed.prepared], rates)
        for observed in layers:
            observed.prepared = True

    @contextmanager
    def masked(self, mask: Tensor) -> Generator[None, None, None]:
        """Count only rows where ``mask`` is True, so that padding does not enter the statistics.

        It concerns the layers whose rows are shaped as the mask, or as the mask flattened. Enclose the forward, and
        with activation checkpointing the backward too.
        """
        previous, self._mask.value = self._mask.value, mask.to(torch.bool)
        try:
            yield
        finally:
            self._mask.value = previous

    def discard(self) -> None:
        """Forget the rows since the last step (an attached optimizer's ``zero_grad`` does it)."""
        for observed in self._layers:
            observed.discard()

    def metrics(self) -> list[tuple[Observed, Preconditioner]]:
        """The layers of the latest step, each with what its gradient was preconditioned by."""
        return [] if self._preconditioners is None else self._preconditioners.of_each()

    def preconditioners(self) -> dict[str, Preconditioner]:
        """What the gradients of the latest step were preconditioned by: mean, guarded variance and ``q^2`` for each path.

        [`normkit.instruments.conditioning`][] takes it.
        """
        return {observed.path: preconditioner for observed, preconditioner in self.metrics()}

    def effects(self, model: nn.Module) -> list[Effect]:
        """Return which modules of ``model`` have preconditioned gradients, see [`normkit.describe`][].

        Args:
            model: The model.
        """
        paths = {module: path for path, module in model.named_modules()}
        attached = {id(o.weight) for handle in self._handles for o in self._layers_of(handle.optimizer)}
        own = {
            observed.layer: observed
            for observed in self._layers
            if observed.layer in paths and observed.weight is not None and observed.weight.requires_grad
        }
        left = {
            paths[layer]: _UNSUPPORTED if observed.unsupported else "its weight is not in the optimizer"
            for layer, observed in own.items()
            if observed.unsupported or id(observed.weight) not in attached
        }
        done = {paths[layer]: layer for layer in own if paths[layer] not in left}
        known = {path: module for module, path in paths.items()}
        left |= {p: reason for p, reason in self.skipped.items() if p in known and trained_elements([known[p]])}
        late = {module for module in paths if isinstance(module, PRODUCERS)} - set(self._known)
        left |= {paths[module]: _LATE for module in late if trained_elements([module])}
        reached = trained_elements(done.values())
        total = trained_elements([*done.values(), *(known[path] for path in left)])
        return [Effect("preconditioned", "modules with weights", tuple(done), left, (reached, total))]

    def remove(self) -> None:
        """Take all hooks off the model and off attached optimizers, which then step on plain gradients."""
        for handle in list(self._handles):
            handle.remove()
        for observed in self._layers:
            observed.remove()
        self._layers = []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the running statistics of each layer that has had rows: ``{path: {"mean", "variance", "steps"}}``."""
        names = ("mean", "variance", "steps")
        self._statistics.write_back()
        return {
            observed.path: dict(zip(names, (t.clone() for t in observed.running), strict=True))
            for observed in self._layers
            if observed.running is not None
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the statistics of ``state_dict``; layers it does not name start anew.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: It names a layer that is not observed, or has another shape than the layer.
        """
        paths = {observed.path: observed for observed in self._layers}
        if unknown := sorted(state.keys() - paths.keys()):
            raise ValueError(f"the state holds statistics of {', '.join(unknown)}, which this BNP does not observe")
        for path, entry in state.items():
            observed = paths[path]
            if observed.materialized() and entry["mean"].shape != (observed.geometry.features,):
                raise ValueError(
                    f"{path}: the state has {entry['mean'].numel()} features, the layer {observed.geometry.features}"
                )
        self._statistics.write_back()
        for observed in self._layers:
            entry = state.get(observed.path)
            device = observed.layer.weight.device
            observed.running = None if entry is None else restored(entry, device)

    def __repr__(self) -> str:
        kept = self._statistics
        options = (
            f"decay={kept.decay}, statistics={self.statistics!r}, pooled={kept.pooled}, eps_relative={kept.eps_relative}, "
            f"eps={kept.eps}, max_change={self.max_change}"
        )
        lines = [f"BNP({options})"]
        lines += [f"  {observed.path}: {_rule(observed)}" for observed in self._layers]
        lines += [f"  {path}: left alone: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)

    def _before_step(self, optimizer: Optimizer) -> None:
        rates = _rates(optimizer)
        if rates.keys() - self._given.keys():
            self._say_what_came_later(optimizer)
        layers = [observed for observed in self._layers if id(observed.layer._parameters.get("weight")) in rates]
        self._precondition([observed for observed in layers if not observed.prepared], rates)
        for observed in layers:
            observed.prepared = False

    def _on_zero_grad(self, optimizer: Optimizer) -> None:
        alone = len(self._handles) == 1
        for observed in self._layers if alone else self._layers_of(optimizer):
            observed.discard()

    def _say_what_is_in_eval_mode(self, layers: Sequence[Observed]) -> None:
        """Log a warning, once, where layers have gradients and counted no rows because they are in eval mode."""
        evaluating = [o for o in layers if not (o.layer.training or o.unsupported or o.counted) and o.has_gradient]
        if evaluating and not self._said_eval_mode:
            self._said_eval_mode = True
            _logger.warning(
                "bnp: %d layers are trained in eval mode (%s, ...), where no rows are counted, so their gradients stay as they "
                "are; call model.train() before the forward pass (norms and dropout may stay in eval mode)",
                len(evaluating),
                evaluating[0].path,
            )

    def _say_what_came_later(self, optimizer: Optimizer) -> None:
        """Log a warning where weights were added to the optimizer that no observed layer holds."""
        added = [p for p in _parameters(optimizer) if id(p) not in self._given]
        self._given |= {id(p): p for p in added}
        held = {id(p) for observed in self._layers for p in observed.layer.parameters(recurse=False)}
        weights = [
            p for p in added if p.ndim > 1 and id(p) not in held
        ]  # no layer that BNP can observe has another shape
        if weights:
            _logger.warning(
                "bnp: %d weights came into the optimizer after attach() and belong to no layer that BNP observes, so their "
                "gradients stay as they are; normkit.handle(optimizer).remove(), then normkit.BNP(model, ...).attach(optimizer), "
                "preconditions those of linear and convolution layers too",
                len(weights),
            )

    def _forget(self, optimizer: Optimizer) -> None:
        self._handles = [handle for handle in self._handles if handle.optimizer is not optimizer]

    def _layers_of(self, optimizer: Optimizer) -> list[Observed]:
        trained = _trained(optimizer)
        return [observed for observed in self._layers if id(observed.weight) in trained]

    @torch.no_grad()
    def _precondition(self, layers: Sequence[Observed], rates: Mapping[int, Rate] | None) -> None:
        """Transform the gradients of ``layers``; a bias that is not among the optimizer's parameters is not trained.

        Raises:
            ValueError: A step is to be bounded and its learning rate is not known.
        """
        layers = [observed for observed in layers if observed.materialized()]
        if not layers:
            return
        self._say_what_is_in_eval_mode(layers)
        if self.max_change is not None and rates is None:
            raise ValueError("max_change bounds a step, so it needs the learning rate: attach the optimizer first")
        self._preconditioners = self._statistics.advance(layers)
        steps = []
        for place, observed in enumerate(layers):
            own: dict[str, Any] = observed.layer._parameters
            weight, bias = own.get("weight"), own["bias"]
            if weight is not None and (grad := weight.grad) is not None:
                bias_grad = None if bias is None or (rates is not None and id(bias) not in rates) else bias.grad
                steps.append(
                    LayerStep(place, weight, grad, bias_grad, None if rates is None else rates.get(id(weight)))
                )
        self._transform(steps, self._preconditioners, self.max_change)


def _rates(optimizer: Optimizer) -> dict[int, Rate]:
    """For each parameter, its ``normkit.optim.step_hooks.effective_lr``."""
    groups = ((effective_lr(optimizer, group), group["params"]) for group in optimizer.param_groups)
    return {id(p): rate for rate, params in groups for p in params}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(p) for p in _parameters(optimizer)}


def _rule(observed: Observed) -> str:
    """What is done with the layer, in words."""
    layer = observed.layer
    if not layer.weight.requires_grad:
        return f"{layer}, frozen: nothing to do"
    if observed.unsupported:
        return f"{layer}, left alone: {_UNSUPPORTED}"
    if layer.bias is not None and layer.bias.requires_grad:
        return f"{layer}, centred and scaled"
    if observed.norm is not None:
        return f"{layer}, scaled; the normalization behind it removes the mean"
    return f"{layer}, scaled, with the metric of a layer without bias"


def precondition_steps(model: nn.Module, optimizer: Optimizer, **options: Any) -> None:
    """Attach a :class:`BNP` of ``model`` to ``optimizer``."""
    BNP(model, **options).attach(optimizer)


_PAPER = "Lange, Helfrich, Ye 2022, arXiv 2108.01110"
_GROUP = "Preconditioned gradients"
_OPTIONS = ("decay", "statistics", "pooled", "eps_relative", "eps", "max_change", "layers")

METHOD = Method(
    recipes=(
        Recipe(
            "bnp",
            "No layers: gradients preconditioned, steps bounded",
            _PAPER,
            0.3,
            convert=Part("none"),
            prepare=ZERO_RESIDUAL,
            attach=Part(precondition_steps, *_OPTIONS, max_change=0.05),
            group=_GROUP,
            revision=2,
        ),
        Recipe(
            "bnp-paper",
            "BNP in its published form: steps are not bounded",
            _PAPER,
            0.03,
            convert=Part("none"),
            attach=Part(precondition_steps, *_OPTIONS, statistics="channels", pooled=False),
            group=_GROUP,
            ablation=True,
            revision=2,
        ),
        Recipe(
            "bnp-adam",
            "BNP's gradients, stepped by Adam",
            _PAPER,
            0.001,
            convert=Part("none"),
            optimizer=Part(adam),
            attach=Part(precondition_steps, *_OPTIONS),
            group=_GROUP,
            ablation=True,
            revision=2,
        ),
        Recipe(
            "group+bnp",
            "Group normalization and BNP's gradients",
            _PAPER,
            0.1,
            convert=Part("group"),
            attach=Part(precondition_steps, *_OPTIONS, max_change=0.05),
            group=_GROUP,
            revision=2,
        ),
    )
)
