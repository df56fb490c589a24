"""The layers that feed batchless layers: what a step needs of them to project the gradients of their weights.

Only what came through the layer's output is projected: a term of the loss that names the weight itself, such as L2, stays.
"""

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.inspection.compiling import disable_dynamo
from normkit.inspection.conformance import computes_as_its_type
from normkit.inspection.counting import Collector, InputCounter, is_counting, is_filled
from normkit.inspection.graph import dataflow, producers
from normkit.inspection.markers import attachment
from normkit.inspection.reads import tensors_read
from normkit.methods.batchless import one_pass
from normkit.methods.batchless.layer import BatchlessNorm
from normkit.methods.batchless.projection import Feeding, Projection
from normkit.methods.kernels import c_kernel
from normkit.methods.kernels.choice import kernels
from normkit.methods.kernels.sums import RowSums
from normkit.moments import Moments, constant_count


class _Offer(NamedTuple):
    """The moments of a layer's output, which the batchless layer behind it need not compute again.

    Attributes:
        output: The output.
        version: How often it had been written to.
        moments: Of its rows.
        seen: Where moments and number of instances go if the batchless layer was given that output.
    """

    output: weakref.ref[Tensor]
    version: int
    moments: Moments
    seen: list[tuple[Moments, int]]


class FeedingLayer(InputCounter[tuple[int, Tensor, list[tuple[Moments, int]]]]):
    """The layer that feeds a batchless layer; its weight's gradients and the sums over the rows of its inputs in this step.

    In a training pass the layer computes with an alias of its weight, whose gradient comes from the layer's output alone: the
    rows count when that gradient comes. Where kernels run and the output is small, the rows of the batchless layer are observed
    and counted together with them: two hooks would cost as much as a small network's own operations.

    Args:
        norm: The batchless layer.
        layer: The linear or (not transposed) convolution layer whose output goes there alone.
        collector: Who takes the rows.
    """

    always_called = True

    def __init__(self, norm: BatchlessNorm, layer: nn.Linear | _ConvNd, collector: Collector) -> None:
        super().__init__(collector)
        self.norm, self.layer = norm, layer
        self.features = layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features
        self.groups = layer.groups if isinstance(layer, _ConvNd) else 1
        self._forget()
        self._handles.append(layer.register_forward_pre_hook(self._lend))
        self._look_at(layer._parameters.get("weight"))
        self.watch(layer)
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_offer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._connect()

    def _connect(self) -> None:
        vars(self.norm)["in_front"] = self  # no child of that module; a copy may have no attributes yet

    def remove(self) -> None:
        """Remove the hooks."""
        super().remove()
        if self.norm.in_front is self:
            del self.norm.in_front

    def _forget(self) -> None:
        """Start anew: a copy of the weight has no hook."""
        self._weight: Tensor | None = None
        self._lent: Tensor | None = None  # the alias, while the layer computes with it
        self._kind: object = None  # shapes and types seen last, and what observes them
        self._sums: RowSums | None = None
        self._both: c_kernel.SumsAndMoments | None = None
        self._offer: _Offer | None = None  # to the batchless layer, which runs next
        self._accepted = False  # since the last step
        self._warned = False
        self._from_output: Tensor | None = None  # in a backward pass that has not come to the weight
        self._elsewhere: Tensor | None = None  # None where everything came from the layer's output
        self._along: Tensor | None = None  # the gradients times the weight; None while .grad holds what they came to
        self._has_gradient = False  # by a backward pass
        self._fills = False  # whether these are of backward passes that filled .grad, or of autograd.grad

    def discard(self) -> None:
        """Discard the rows and the gradients since the last step."""
        super().discard()
        self._from_output = self._elsewhere = self._along = None
        self._has_gradient = self._fills = self._accepted = False

    @attachment
    @disable_dynamo
    def _lend(self, layer: nn.Module, _: Any) -> None:
        weight = layer._parameters.get("weight")  # None where it is computed from other parameters
        trains = self.norm.training and torch.is_grad_enabled() and is_counting() and self.collector.collects
        if not trains or weight is None or not weight.requires_grad:
            return
        self._look_at(weight)
        self._lent = layer._parameters["weight"] = weight.view_as(weight)  # pyright: ignore[reportArgumentType]

    def _look_at(self, weight: Tensor | None) -> None:
        """See the gradients of the weight, also those of backward passes before the first forward."""
        if weight is not self._weight and weight is not None and weight.requires_grad:
            self._weight = weight
            self._handles.append(weight.register_hook(self._split))

    def _add_from_output(self, grad: Tensor) -> None:
        self._from_output = grad.detach() if self._from_output is None else self._from_output + grad.detach()

    def _split(self, grad: Tensor) -> None:
        """Take note of a backward pass's whole gradient of the weight, and of what of it is not from the layer's output."""
        if not (is_counting() and self.collector.collects):
            return
        output, self._from_output = self._from_output, None
        fills = self._weight is not None and is_filled(self.leaf_of(self._weight))
        if self._fills and not fills:
            return  # autograd.grad hands a gradient out; it counts where no other pass does (p.grad = autograd.grad(...))
        if fills and not self._fills:
            self._elsewhere = self._along = None
            self._has_gradient = False
        former = self._weight.grad if fills and self._weight is not None else None
        first, self._has_gradient, self._fills = not self._has_gradient, True, fills
        whole = output is not None and output.data_ptr() == grad.data_ptr()  # from the output: nothing was added
        if whole and fills and self._along is None and (former is None or not first):
            return  # .grad is all that the step needs, unless another pass adds what is not from the output
        if self._along is None and former is not None and not first:
            self._along = self._times_weight(former)
        along = self._times_weight(grad)
        self._along = along if self._along is None else self._along + along
        if whole:
            return
        # a copy, since torch makes this tensor .grad and lets later backward passes add to it
        elsewhere = grad.detach().clone() if output is None else grad.detach() - output
        self._elsewhere = elsewhere if self._elsewhere is None else self._elsewhere + elsewhere

    def _times_weight(self, grad: Tensor) -> Tensor:
        """Product of a gradient with the weight, per output."""
        weight, dtype = self.layer.weight.detach(), self.norm.running_mean.dtype
        return (grad.detach().to(dtype) * weight.to(dtype)).flatten(1).sum(1)

    @attachment
    @disable_dynamo
    def _after_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None
    ) -> None:
        """Give the layer its own weight back, and count the rows of its input."""
        lent, weight, self._lent = self._lent, self._weight, None
        if lent is None or weight is None:
            return
        layer._parameters["weight"] = weight  # pyright: ignore[reportArgumentType]
        if output is None or not output.requires_grad:
            return
        x = args[0] if args else kwargs["input"]
        seen: list[tuple[Moments, int]] = []  # the rows of the batchless layer, once it has accepted the offer
        sums, moments = self._observe(x, output)
        self._offer = None if moments is None else _Offer(weakref.ref(output), output._version, moments, seen)
        self.count(lent, (x.numel() // self.features, sums, seen), weight, note=self._add_from_output)

    def _observe(self, x: Tensor, output: Tensor) -> tuple[Tensor, Moments | None]:
        """The sums over the rows of the input and, where that is one call, the moments of the output's."""
        pivot: Any = self.norm._parameters["running_mean"]
        kind = x.shape, x.dtype, x.device, output.shape, output.dtype, pivot.dtype
        if self._sums is None or self._kind != kind:
            dim = 1 if isinstance(self.layer, _ConvNd) else -1
            self._kind, self._sums, self._both = kind, RowSums(x, dim), None
            small = 0 < output.numel() <= one_pass.few and x.numel() > 0
            if small and x.dtype == output.dtype == pivot.dtype and output.dim() > 1:
                self._both = c_kernel.SumsAndMoments((x.shape, output.shape), x.dtype, (dim, self.norm.feature_dim))
        if self._both is not None and kernels(x, output, pivot) == "c":
            found = self._both(x, output, pivot)
            if found is not None:
                sums, mean, m2 = found
                return sums, Moments(constant_count(output.numel() / len(mean), mean.dtype), mean, m2)
        return self._sums(x), None

    def has_observed(self, x: Tensor) -> bool:
        """Return whether ``x`` is this layer's output as it was observed; then its rows count together with the input's."""
        offer, self._offer = self._offer, None
        if offer is None or offer.output() is not x or offer.version != x._version:
            return False
        offer.seen.append((offer.moments, len(x)))
        self._accepted = True
        return True

    def take_sums(self) -> tuple[int, Tensor, Tensor | None]:
        """Return the sums since the last call, and hand the batchless layer its rows over.

        Returns:
            Number of rows; sum and sum of squares of the layer's inputs ``(in, 2)``; the weight's gradients, all terms of
            the loss together, times the weight ``(out,)``, None where all of them came from the layer's output.
        """
        counted = self.take()
        for _, _, seen in counted:
            for rows in seen:
                self.norm.counter.receive(rows)
        if len(counted) == 1:
            return *counted[0][:2], self._along
        if not counted:
            self._warn_where_gamma_alone_was_trained()
            return 0, self.norm.running_mean.new_zeros(self.features, 2), self._along
        sums = functools.reduce(torch.add, [sums for _, sums, _ in counted])
        return sum(rows for rows, _, _ in counted), sums, self._along

    def _warn_where_gamma_alone_was_trained(self) -> None:
        gamma = self.norm._parameters["weight"]
        if self._accepted and not self._warned and gamma is not None and gamma.grad is not None:
            self._warned = True
            warnings.warn(
                f"{self.norm}: no backward pass since the last step gave a gradient to the weight of {self.layer} in front of "
                "it (backward(inputs=...) without that weight?), so mu and sigma stay as they are; add the weight to inputs, or "
                "freeze it with requires_grad_(False)",
                stacklevel=2,
            )

    def from_output(self, along: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Return the part of ``.grad`` that came from the layer's output, and the rest of it; the rows are done with.

        Unscaling and clipping multiply ``.grad`` by a factor that the gradients of single backward passes lack: it is found
        by least squares from the products of both with the weight.

        Args:
            along: The weight's gradients times the weight, mean over all ranks, ``(out,)``; None where all of them came from
                the layer's output on every rank.

        Returns:
            ``.grad`` itself and None where all of it came from there; None where there is no gradient.
        """
        elsewhere, reached, weight = self._elsewhere, self._has_gradient, self.layer._parameters.get("weight")
        self.discard()
        if weight is None or weight.grad is None or not reached:
            return None
        if elsewhere is None or along is None:
            return weight.grad, None
        factor = (self._times_weight(weight.grad) @ along / along.square().sum()).nan_to_num(0, 0, 0)
        elsewhere = (elsewhere * factor).to(weight.grad.dtype)
        return weight.grad - elsewhere, elsewhere


class WeightProjection:
    """Projects the gradients of the weights in front of batchless layers once the rows of a step are complete.

    Args:
        feeding: The layers that feed them.
    """

    def __init__(self, feeding: Sequence[FeedingLayer] = ()) -> None:
        self.feeding = feeding
        self._project = Projection()

    def __call__(self, sums: Sequence[tuple[Tensor | int, Tensor, Tensor | None]], ranks: int = 1) -> dict[int, float]:
        """Project ``.grad`` of the weights in place.

        Args:
            sums: What ``FeedingLayer.take_sums`` gave for each, over all ranks. Statistics that are not finite count as zero.
            ranks: Number of ranks.

        Returns:
            By the ``id`` of the weight, the length of its gradient relative to its own, where a kernel found it.
        """
        layers, rests = [], []
        for feeder, (rows, of_features, along) in zip(self.feeding, sums, strict=True):
            found = feeder.from_output(along if along is None or ranks == 1 else along / ranks)
            if found is not None:
                (grad, elsewhere), weight = found, feeder.layer._parameters["weight"]
                layers.append(Feeding(grad, weight, feeder.groups, rows, of_features))  # pyright: ignore[reportArgumentType]
                if elsewhere is not None:
                    rests.append((weight, grad, elsewhere))
        lengths = self._project(layers)
        for weight, grad, elsewhere in rests:
            weight.grad.copy_(grad + elsewhere)
            lengths.pop(id(weight), None)
        return lengths


def feeding_layers(model: nn.Module, collector: Collector) -> list[FeedingLayer]:
    """Return one ``FeedingLayer`` for each projected layer of ``model`` that only one linear or convolution layer feeds.

    The weight must be a parameter of that layer alone, which multiplies its input by it and by nothing else: what another
    layer, or the model, does with it may depend on its scale, and what it is computed from has gradients of its own.
    """
    modules = dict(model.named_modules())
    holders = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    flow = dataflow(model)
    read = tensors_read(model, flow)
    pairs = ((modules[norm], modules[source]) for norm, source in producers(model, flow).items())
    return [
        FeedingLayer(norm, layer, collector)
        for norm, layer in pairs
        if isinstance(norm, BatchlessNorm)
        and norm.projected
        and isinstance(layer, (nn.Linear, _ConvNd))
        and not isinstance(layer, _ConvTransposeNd)
        and holders[id(layer._parameters.get("weight"))] == 1
        and layer not in read
        and computes_as_its_type(layer)
    ]
