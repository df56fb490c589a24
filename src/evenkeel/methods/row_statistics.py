"""Running statistics of many layers' inputs, advanced together once per optimizer step.

All layers lie in one vector, so that a step costs a handful of operations and one all-reduce however many layers
there are, and nothing waits for the device.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from evenkeel.methods.observed import Observed, Sums, wide_dtype
from evenkeel.methods.preconditioning import guarded_variance, step_divisor, update_running


class Metric(NamedTuple):
    """What preconditions one layer: mean and guarded variance of its input, and ``q^2``."""

    mean: Tensor
    variance: Tensor
    divisor: Tensor


class RowStatistics:
    """How running statistics are kept.

    Args:
        decay: Decay per optimizer step; the first steps are averaged evenly.
        eps_relative: Guard of the variances relative to the largest of the layer.
        eps: Absolute guard of the variances.
        group: Ranks that share their rows, default the world.
    """

    def __init__(self, decay: float, eps_relative: float, eps: float, group: dist.ProcessGroup | None) -> None:
        self.decay, self.eps_relative, self.eps, self.group = decay, eps_relative, eps, group
        self._layout: tuple[object, Tensor, Tensor] | None = None
        self._held: tuple[Sequence[Observed], Tensor, Tensor, Tensor] | None = None

    def advance(self, layers: Sequence[Observed]) -> list[Metric]:
        """Take this step's rows into the running statistics; what preconditions each layer now."""
        device = layers[0].layer.weight.device
        sizes = [seen.geometry.features for seen in layers]
        owner, fan_in = self._layout_of(layers, device)
        rows, positions, total, square = self._reduced([_summed(seen.take()) for seen in layers], sizes, device)

        mean, variance, steps = self._running(layers, sizes, total)

        # a layer's sum of squares is finite only if each of its rows is
        usable = (rows > 0) & rows.new_zeros(len(layers)).scatter_add(0, owner, square).isfinite()
        steps = steps + usable
        weight = torch.where(usable, steps.clamp(min=1).reciprocal().clamp(min=1 - self.decay), 0)[owner]
        batch_mean = total / rows[owner].clamp(min=1)
        batch_variance = (square / rows[owner].clamp(min=1) - batch_mean.square()).clamp(min=0)
        new_mean, new_variance = update_running(mean, variance, batch_mean, batch_variance, weight)
        mean = torch.where(usable[owner], new_mean, mean)
        variance = torch.where(usable[owner], new_variance, variance)
        self._held = layers, mean, variance, steps

        largest = _largest(variance, owner, len(layers))[owner]
        guarded = guarded_variance(variance, self.eps_relative, self.eps, largest=largest)
        guarded = torch.where((steps > 0)[owner], guarded, 1)  # a layer that never saw a usable row steps as it is
        divisor = step_divisor(fan_in, positions)
        kinds = [(_compute_dtype(weight), weight.device) for weight in (seen.layer.weight for seen in layers)]
        metrics = {
            kind: [t.to(device=kind[1], dtype=kind[0]) for t in (mean, guarded, divisor)]
            for kind in dict.fromkeys(kinds)
        }
        parts = {kind: list(zip(m.split(sizes), s.split(sizes), q, strict=True)) for kind, (m, s, q) in metrics.items()}
        return [Metric(*parts[kind][i]) for i, kind in enumerate(kinds)]

    def hand_back(self) -> None:
        """Give each layer its own running statistics, which lie in one vector while the same layers step together."""
        if self._held is not None:
            layers, mean, variance, steps = self._held
            sizes = [seen.geometry.features for seen in layers]
            for seen, m, v, t in zip(layers, mean.split(sizes), variance.split(sizes), steps, strict=True):
                seen.running = (m, v, t)
            self._held = None

    def _running(self, layers: Sequence[Observed], sizes: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean and variance per feature and steps per layer, on the device of ``like``."""
        if self._held is not None and self._held[1].device == like.device:
            held, mean, variance, steps = self._held
            if len(held) == len(layers) and all(a is b for a, b in zip(held, layers, strict=True)):
                return mean, variance, steps
        self.hand_back()
        known = [seen.running or _nothing(size, like) for seen, size in zip(layers, sizes, strict=True)]
        mean, variance = (torch.cat([_at(entry[i], like.device) for entry in known]) for i in (0, 1))
        return mean, variance, torch.stack([_at(entry[2], like.device) for entry in known])

    def _reduced(
        self, sums: Sequence[Sums | None], sizes: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows and positions per layer, sums and squares per feature, over all ranks in one all-reduce."""
        wide = wide_dtype(device)
        none = torch.zeros((), dtype=wide, device=device)
        given = [s or Sums(0.0, 0.0, none.expand(n), none.expand(n)) for s, n in zip(sums, sizes, strict=True)]
        counts = _to_device([s.rows for s in given] + [s.positions for s in given], wide, device)
        features = [_at(s.total, device) for s in given] + [_at(s.square, device) for s in given]
        flat = torch.cat([counts, *features])  # promoted to the counts' dtype
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            dist.all_reduce(flat, group=self.group)
        rows, positions, total, square = flat.split([len(sizes), len(sizes), sum(sizes), sum(sizes)])
        return rows, positions, total, square

    def _layout_of(self, layers: Sequence[Observed], device: torch.device) -> tuple[Tensor, Tensor]:
        """For each feature the index of its layer, and the fan-in of each layer; made once, as copying makes hosts wait."""
        key = (device, *(id(seen) for seen in layers))
        if self._layout is None or self._layout[0] != key:
            shapes = [seen.geometry for seen in layers]
            owner = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor([s.features for s in shapes]))
            fan_in = torch.tensor([float(shape.fan_in) for shape in shapes], dtype=wide_dtype(device))
            self._layout = key, owner.to(device), fan_in.to(device)
        return self._layout[1:]


def _at(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)


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


def restored(entry: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics from a state_dict's entry."""
    wide = wide_dtype(device)
    mean, variance, steps = (entry[name].to(device, wide).clone() for name in ("mean", "variance", "steps"))
    return mean, variance, steps


def _largest(values: Tensor, owner: Tensor, layers: int) -> Tensor:
    """The largest value of each layer, for values >= 0."""
    return values.new_zeros(layers).scatter_reduce(0, owner, values, "amax")
