"""Batch normalization preconditioning: train a plain network as if its layers' inputs were normalized.

Lange, Helfrich, Ye. "Batch Normalization Preconditioning for Neural Network Training", JMLR 23(72), 2022,
arXiv 2108.01110.

The mathematics is in :mod:`evenkeel.methods.preconditioning`; here is the state: running statistics of every layer's
input, gathered by forward hooks, and the moment at which gradients are transformed.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from evenkeel.methods.bnp_layers import choose, removed_means
from evenkeel.methods.observed import Observed, Sums, geometry, wide_dtype
from evenkeel.methods.preconditioning import guarded_variance, precondition, step_divisor, update_running
from evenkeel.stepping import StepHandle, before_step


class BNP:
    """Preconditions the gradients of all linear and convolution layers of a model.

    The model is not changed: no layer, no buffer, the plain state_dict, and in eval mode the plain graph. Statistics
    of a step come from exactly the rows whose gradients it uses: all micro-batches, all ranks (one all-reduce per
    step for all layers together), nothing from evaluation.

    Args:
        model: Any module. Every Linear, Conv1-3d and ConvTranspose1-3d is observed; ``skipped`` lists the others.
        decay: Decay of the running statistics per optimizer step; the first steps are averaged evenly.
        eps_relative: Guard of the variances relative to the largest of the layer.
        eps: Absolute guard of the variances.
        layers: Paths of the layers to precondition, default all.
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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if eps_relative < 0 or eps < 0 or eps_relative + eps == 0:
            raise ValueError(
                f"eps_relative and eps must be non-negative and not both zero, got {eps_relative} and {eps}: "
                "the gradients of constant inputs would be divided by zero"
            )
        self.decay, self.eps_relative, self.eps = decay, eps_relative, eps
        self.process_group = process_group
        self._mask: Tensor | None = None
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
            ValueError: The optimizer evaluates its closure several times (LBFGS), or it holds no observed weight.
        """
        attached = self._layers_of(optimizer)
        if not attached:
            raise ValueError(
                "the optimizer holds no weight of a layer that BNP observes; build it from the parameters of this model"
            )
        for seen in attached:
            seen.place()

        def prepare() -> None:
            layers = self._layers_of(optimizer)
            self._precondition([seen for seen in layers if not seen.prepared], _trained(optimizer))
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
        return StepHandle([handle.remove, *(hook.remove for hook in hooks)])

    @torch.no_grad()
    def precondition_(self) -> None:
        """Precondition the gradients now, by hand: before clipping, say (under AMP after ``scaler.unscale_``).

        The next step of an attached optimizer then leaves them as they are.
        """
        self._precondition([seen for seen in self._layers if not seen.prepared], None)
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

    def remove(self) -> None:
        """Take all hooks off the model; an attached optimizer then steps on plain gradients."""
        for seen in self._layers:
            seen.remove()
        self._layers = []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Running statistics per layer that has seen rows: ``{path: {"mean", "variance", "steps"}}``."""
        names = ("mean", "variance", "steps")
        return {
            seen.path: dict(zip(names, (t.clone() for t in seen.running), strict=True))
            for seen in self._layers
            if seen.running is not None
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the statistics of :meth:`state_dict`; layers it does not name start anew.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: It names a layer that is not observed, or has another shape than the layer.
        """
        paths = {seen.path: seen for seen in self._layers}
        if unknown := sorted(state.keys() - paths.keys()):
            raise ValueError(f"the state holds statistics of {', '.join(unknown)}, which this BNP does not observe")
        for path, entry in state.items():
            seen = paths[path]
            if seen.materialized() and entry["mean"].shape != (geometry(seen.layer).features,):
                raise ValueError(
                    f"{path}: the state has {entry['mean'].numel()} features, the layer {geometry(seen.layer).features}"
                )
        for seen in self._layers:
            entry = state.get(seen.path)
            device = seen.layer.weight.device
            seen.running = None if entry is None else _running(entry, device)

    def __repr__(self) -> str:
        lines = [f"BNP(decay={self.decay}, eps_relative={self.eps_relative}, eps={self.eps})"]
        lines += [f"  {seen.path}: {_rule(seen)}" for seen in self._layers]
        lines += [f"  {path}: left alone: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)

    def _layers_of(self, optimizer: Optimizer) -> list[Observed]:
        trained = _trained(optimizer)
        return [seen for seen in self._layers if id(seen.layer.weight) in trained]

    def _precondition(self, layers: Sequence[Observed], trained: set[int] | None) -> None:
        layers = [seen for seen in layers if seen.materialized()]
        if not layers:
            return
        ready = self._advance(layers)
        for seen, (mean, variance, divisor) in zip(layers, ready, strict=True):
            weight, bias = seen.layer.weight, seen.layer.bias
            if weight.grad is None:
                continue
            shape = geometry(seen.layer)
            bias_grad = None if bias is None or (trained is not None and id(bias) not in trained) else bias.grad
            new_weight, new_bias = precondition(
                weight.grad,
                bias_grad,
                mean,
                variance,
                divisor=divisor,
                groups=shape.groups,
                transposed=shape.transposed,
                mean_removed=seen.mean_removed,
            )
            weight.grad.copy_(new_weight)
            if bias_grad is not None and new_bias is not None:
                bias_grad.copy_(new_bias)

    def _advance(self, layers: Sequence[Observed]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Take this step's rows into the statistics of all layers at once; mean, guarded variance, q^2 of each."""
        device = layers[0].layer.weight.device
        shapes = [geometry(seen.layer) for seen in layers]
        sizes = [shape.features for shape in shapes]
        rows, positions, total, square = self._reduced([_summed(seen.take()) for seen in layers], sizes, device)

        owner = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(sizes)).to(device)
        fan_in = torch.tensor([float(shape.fan_in) for shape in shapes], dtype=total.dtype).to(device)
        known = [seen.running or _nothing(size, total) for seen, size in zip(layers, sizes, strict=True)]
        mean, variance = (torch.cat([k[i].to(device) for k in known]) for i in (0, 1))
        steps = torch.stack([k[2].to(device) for k in known])

        finite = total.isfinite() & square.isfinite()
        usable = (rows > 0) & (_largest((~finite).to(total.dtype), owner, len(layers)) == 0)
        steps = steps + usable
        weight = torch.where(usable, (1 / steps.clamp(min=1)).clamp(min=1 - self.decay), 0)[owner]
        batch_mean = total / rows[owner].clamp(min=1)
        batch_variance = (square / rows[owner].clamp(min=1) - batch_mean.square()).clamp(min=0)
        new_mean, new_variance = update_running(mean, variance, batch_mean, batch_variance, weight)
        mean = torch.where(usable[owner], new_mean, mean)
        variance = torch.where(usable[owner], new_variance, variance)
        for seen, m, v, t in zip(layers, mean.split(sizes), variance.split(sizes), steps, strict=True):
            seen.running = (m, v, t)

        largest = _largest(variance, owner, len(layers))[owner]
        guarded = guarded_variance(variance, self.eps_relative, self.eps, largest=largest)
        guarded = torch.where((steps > 0)[owner], guarded, 1)  # a layer that never saw a usable row steps as it is
        divisor = step_divisor(fan_in, positions)
        by_dtype = {
            dtype: (mean.to(dtype).split(sizes), guarded.to(dtype).split(sizes), divisor.to(dtype))
            for dtype in {_compute_dtype(seen.layer.weight) for seen in layers}
        }
        ready = []
        for i, seen in enumerate(layers):
            m, s, q = by_dtype[_compute_dtype(seen.layer.weight)]
            ready.append(tuple(t.to(seen.layer.weight.device) for t in (m[i], s[i], q[i])))
        return ready

    def _reduced(
        self, sums: Sequence[Sums | None], sizes: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows and positions per layer, sums and squares per feature, over all ranks in one all-reduce."""
        wide = wide_dtype(device)
        none = torch.zeros((), dtype=wide)
        given = [s or Sums(0.0, 0.0, none.expand(n), none.expand(n)) for s, n in zip(sums, sizes, strict=True)]
        counts = _to_device([s.rows for s in given] + [s.positions for s in given], wide, device)
        flat = torch.cat([counts, *(t.to(device, wide) for t in [s.total for s in given] + [s.square for s in given])])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            dist.all_reduce(flat, group=self.process_group)
        rows, positions, total, square = flat.split([len(sizes), len(sizes), sum(sizes), sum(sizes)])
        return rows, positions, total, square


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _summed(seen: Sequence[Sums]) -> Sums | None:
    """The sums of all forwards of a step (in fp64 where there are several)."""
    if len(seen) < 2:
        return seen[0] if seen else None
    wide = wide_dtype(seen[0].total.device)
    total = torch.stack([s.total.to(wide) for s in seen]).sum(0)
    square = torch.stack([s.square.to(wide) for s in seen]).sum(0)
    return Sums(sum(s.rows for s in seen), sum(s.positions for s in seen), total, square)


def _to_device(values: Sequence[Tensor | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One vector of numbers and scalar tensors, without waiting for the device."""
    pinned = device.type == "cuda"
    numbers = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=dtype, pin_memory=pinned)
    vector = numbers.to(device, non_blocking=True)
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    if not tensors:
        return vector
    return torch.stack([
        torch.as_tensor(v, device=device).to(dtype) if isinstance(v, Tensor) else vector[i]
        for i, v in enumerate(values)
    ])


def _nothing(features: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like.new_zeros(features), like.new_ones(features), like.new_zeros(())


def _running(entry: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(device)
    mean, variance, steps = (entry[name].to(device, wide).clone() for name in ("mean", "variance", "steps"))
    return mean, variance, steps


def _largest(values: Tensor, owner: Tensor, layers: int) -> Tensor:
    """The largest value of each layer, for values >= 0."""
    return values.new_zeros(layers).scatter_reduce(0, owner, values, "amax")


def _rule(seen: Observed) -> str:
    """What is done with the layer, in words."""
    layer = seen.layer
    if not layer.weight.requires_grad:
        return f"{layer}, frozen: nothing to do"
    if layer.bias is not None and layer.bias.requires_grad:
        return f"{layer}, centred and scaled"
    if seen.norm is not None:
        return f"{layer}, scaled; the normalization behind it removes the mean"
    return f"{layer}, scaled, with the metric of a layer without bias"
