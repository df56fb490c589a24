"""Running statistics of many layers' inputs, advanced together once per optimizer step.

All layers lie in one vector, so that a step costs a handful of operations and one all-reduce however many layers
there are, and nothing waits for the device.
"""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.methods.bnp import c_kernel
from normkit.methods.bnp.observer import Observed, Sums, wide_dtype
from normkit.methods.bnp.preconditioning import guarded_variance, step_divisor, update_running
from normkit.moments import reduce_together


class Preconditioner(NamedTuple):
    """What preconditions one layer: mean and guarded variance of its input, and ``q^2``."""

    mean: Tensor
    variance: Tensor
    divisor: Tensor


class LayerIndex:
    """Layers that step together, and where their features lie in vectors over all of them.

    Attributes:
        layers: The layers.
        device: Where the vectors live.
        sizes: Features of each layer.
        indices: Of each layer the indices of its features.
        owner: For each feature the index of its layer.
        first: The first feature of each layer, and behind them the number of all.
        fan_in: Of each layer.
        flat: What is summed over ranks: rows and output positions of each layer, sum and sum of squares of each feature.
        sums: View of its part for the features, ``(features, 2)``.
    """

    def __init__(self, layers: Sequence[Observed], device: torch.device) -> None:
        self.layers, self.device = list(layers), device
        shapes = [observed.geometry for observed in layers]
        self.sizes = [shape.features for shape in shapes]
        self.indices = torch.arange(sum(self.sizes), device=device).split(self.sizes)
        self.owner = torch.cat([torch.full((size,), i, device=device) for i, size in enumerate(self.sizes)])
        self.first = torch.tensor([0, *self.sizes], device=device).cumsum(0)
        fan_in = [float(shape.fan_in) for shape in shapes]
        self.fan_in = torch.tensor(fan_in, dtype=wide_dtype(device), device=device)
        self._allocate()

    def _allocate(self) -> None:
        layers, features = len(self.layers), sum(self.sizes)
        self.flat = self.fan_in.new_zeros(2 * (layers + features))
        self.sums = self.flat[2 * layers :].view(features, 2)
        self.nothing = [
            zeros.view(-1, 2) for zeros in self.fan_in.new_zeros(2 * features).split([2 * size for size in self.sizes])
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"flat", "sums", "nothing"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._allocate()  # pickled views would not share their memory any more

    def largest(self, values: Tensor) -> Tensor:
        """The largest value of each layer, for values >= 0."""
        return values.new_zeros(len(self.layers)).scatter_reduce_(0, self.owner, values, "amax")

    def summed(self, values: Tensor) -> Tensor:
        """The sum of each layer."""
        return values.new_zeros(len(self.layers)).scatter_add_(0, self.owner, values)

    def per_feature(self, *of_layers: Tensor) -> Tensor:
        """Numbers of the layers as numbers of their features, a row for each argument."""
        return torch.stack(of_layers).index_select(1, self.owner)


class Preconditioners(NamedTuple):
    """What preconditions the layers of a step, side by side; ``known`` is 0 for layers that step as they are, else 1."""

    layer_index: LayerIndex
    mean: Tensor
    variance: Tensor
    divisor: Tensor
    known: Tensor

    def of_each(self) -> list[tuple[Observed, Preconditioner]]:
        """Each layer with its metric, in the dtype and on the device of its weight."""
        sizes = self.layer_index.sizes
        parts = zip(
            self.layer_index.layers, self.mean.split(sizes), self.variance.split(sizes), self.divisor, strict=True
        )
        each = []
        for observed, *tensors in parts:
            weight = observed.layer.weight
            each.append((observed, Preconditioner(*(t.to(weight.device, compute_dtype(weight)) for t in tensors))))
        return each


class RowStatistics:
    """How running statistics are kept.

    Args:
        decay: Decay per optimizer step.
        pooled: Whether they are those of all rows: the first steps averaged evenly, the variance between steps included.
        eps_relative: Guard of the variances relative to the largest of the layer.
        eps: Absolute guard of the variances.
        group: Ranks that share their rows, default the world.
    """

    def __init__(
        self, decay: float, pooled: bool, eps_relative: float, eps: float, group: dist.ProcessGroup | None
    ) -> None:
        self.decay, self.pooled, self.eps_relative, self.eps, self.group = decay, pooled, eps_relative, eps, group
        self._index: LayerIndex | None = None
        self._numbers: tuple[object, Tensor] | None = None
        self._running: tuple[LayerIndex, Tensor, Tensor, Tensor] | None = None

    def advance(self, layers: Sequence[Observed]) -> Preconditioners:
        """Take this step's rows into the running statistics; what preconditions the layers now."""
        index = self._index_of(layers)
        flat = self._reduced(index)
        kept = self._running_of(index)
        options = {"decay": self.decay, "pooled": self.pooled, "eps_relative": self.eps_relative, "eps": self.eps}
        if (used := c_kernel.advance(index.first, index.fan_in, flat, kept, **options)) is not None:
            self._running = index, *kept
            return Preconditioners(index, *used)
        layer_count = len(index.layers)
        rows, positions, both = flat.split([layer_count, layer_count, 2 * sum(index.sizes)])
        sums = both.view(-1, 2).T
        mean, variance, steps = kept

        # a layer's sum of squares is finite only if each of its rows is
        usable = (rows > 0) & (index.summed(sums[1]) < inf)
        steps = steps + usable
        share = steps.clamp(min=1).reciprocal_().clamp_(min=1 - self.decay) if self.pooled else 1 - self.decay
        weight = usable * share
        count, weight = index.per_feature(rows.clamp(min=1), weight)
        batch_mean, batch_square = sums.masked_fill_(weight == 0, 0).div_(count)
        batch_variance = batch_square.addcmul_(batch_mean, batch_mean, value=-1).clamp_(min=0)
        mean, variance = update_running(mean, variance, batch_mean, batch_variance, weight, pooled=self.pooled)
        torch._foreach_copy_(kept, (mean, variance, steps))  # a CUDA graph of the step reads what its last replay wrote
        self._running = index, *kept

        # a layer without rows in this step (in eval mode, or its weight is used without calling it), or that never saw a
        # usable one, steps as it is
        known = ((steps > 0) & (rows > 0)).to(steps.dtype)
        largest, unknown = index.per_feature(index.largest(variance), 1 - known)
        guarded = guarded_variance(variance, self.eps_relative, self.eps, largest=largest).masked_fill_(unknown > 0, 1)
        divisor = step_divisor(index.fan_in, positions).masked_fill_(positions == 0, 1)
        return Preconditioners(index, mean.masked_fill(unknown > 0, 0), guarded, divisor, known)

    def write_back(self) -> None:
        """Give each layer its own running statistics, which lie in one vector while the same layers step together."""
        if self._running is not None:
            index, mean, variance, steps = self._running
            parts = zip(mean.split(index.sizes), variance.split(index.sizes), steps, strict=True)
            for observed, running in zip(index.layers, parts, strict=True):
                observed.running = running
            self._running = None

    def _running_of(self, index: LayerIndex) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean and variance per feature and steps per layer."""
        if self._running is not None and self._running[0] is index:
            return self._running[1:]
        self.write_back()
        like = index.fan_in
        known = [observed.running or _nothing(n, like) for observed, n in zip(index.layers, index.sizes, strict=True)]
        mean, variance = (torch.cat([_at(entry[i], index.device) for entry in known]) for i in (0, 1))
        return mean, variance, torch.stack([_at(entry[2], index.device) for entry in known])

    def _reduced(self, index: LayerIndex) -> Tensor:
        """Rows and positions per layer, then sums and squares per feature, over all ranks in one all-reduce."""
        layers, flat = len(index.layers), index.flat
        rows: list[Tensor | float] = []
        positions: list[Tensor | float] = []
        of_features = []
        for observed, nothing in zip(index.layers, index.nothing, strict=True):
            taken = observed.take()
            sums = taken[0] if len(taken) == 1 else _summed(taken) or Sums(0.0, 0.0, nothing)
            rows.append(sums.rows)
            positions.append(sums.positions)
            of_features.append(sums.of_features)
        flat[: 2 * layers].copy_(self._on_device(rows + positions, flat.dtype, index.device))
        torch.cat(of_features, out=index.sums)
        _, (flat,) = reduce_together((), (flat,), self.group)
        return flat

    def _on_device(self, values: Sequence[Tensor | float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """One vector of numbers and scalar tensors, without waiting for the device; numbers seldom change from step to step."""
        on_device = any(isinstance(value, Tensor) for value in values)
        numbers = [0.0 if isinstance(value, Tensor) else value for value in values] if on_device else values
        if self._numbers is None or self._numbers[0] != (numbers, device):
            pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
            self._numbers = (numbers, device), pinned.to(device, non_blocking=True)
        vector = self._numbers[1]
        if not on_device:
            return vector
        return torch.stack([
            torch.as_tensor(value, device=device).to(dtype) if isinstance(value, Tensor) else vector[i]
            for i, value in enumerate(values)
        ])

    def _index_of(self, layers: Sequence[Observed]) -> LayerIndex:
        """The index of these layers, made once, as copying makes hosts wait."""
        device = layers[0].layer.weight.device
        if self._index is None or self._index.device != device or self._index.layers != layers:
            self._index = LayerIndex(layers, device)
        return self._index


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the gradient of ``weight`` is transformed."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _at(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)


def _summed(sums: Sequence[Sums]) -> Sums | None:
    """The sums of several forwards of a step, in fp64; None for none."""
    if not sums:
        return None
    wide = wide_dtype(sums[0].of_features.device)
    of_features = torch.stack([s.of_features.to(wide) for s in sums]).sum(0)
    return Sums(sum(s.rows for s in sums), sum(s.positions for s in sums), of_features)


def _nothing(features: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like.new_zeros(features), like.new_ones(features), like.new_zeros(())


def restored(entry: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics from a state_dict's entry."""
    wide = wide_dtype(device)
    mean, variance, steps = (entry[name].to(device, wide).clone() for name in ("mean", "variance", "steps"))
    return mean, variance, steps
