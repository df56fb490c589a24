"""Project the gradient of the weights in front of a batchless layer: remove what the normalization undoes.

Our own addition to Berger, Uc Cetina, "Batchless Normalization", arXiv 2212.14729; see docs/batchless.md.

With ``n' = dL/dn``, batch normalization passes on ``dL/dx = (n' - mean(n') - n mean(n' n)) / sigma``; batchless normalization
passes on ``n' / sigma``. In the gradient of the linear or convolution layer that produces ``x = W h``, the two missing terms
add up over the rows to parts along two known directions: the mean of h, which shifts x, and W, which scales x. Neither
changes the function that batch normalization would train. The step removes both once its rows are complete.

Only what came through the layer's output is projected: a term of the loss that names the weight itself, such as L2, stays.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.inspection.compiling import disable_dynamo
from normkit.inspection.conformance import computes_as_its_type
from normkit.inspection.counting import Collector, InputCounter, is_counting, is_filled
from normkit.inspection.graph import dataflow, producers
from normkit.inspection.markers import attachment
from normkit.inspection.reads import tensors_read
from normkit.methods.batchless.functions import per_feature
from normkit.methods.batchless.layer import BatchlessNorm
from normkit.methods.kernels.sums import sum_and_square_sum


def projected_weight_gradient(
    grad: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, *, groups: int = 1
) -> Tensor:
    """Return the gradient of W in ``x = W h`` without its parts that shift or scale x, per output of W.

    With the mean m and the variance s of h, ``v = sum(m^2 s) / m^2`` the variance of h along m, and per output

        g <- g - m (g m) / (m^2 + v),    g <- g - w (g w) / w^2.

    The first removes the share ``m^2 / (m^2 + v)`` of g along m, nothing where h is centered: it is the share of the mean in
    the squares of h along m. The second makes g orthogonal to w, as batch normalization's gradient is. For centered,
    uncorrelated inputs of equal variance the result *is* batch normalization's gradient. It is linear in g.

    Args:
        grad: g, dL/dW, ``(out, in / groups, *taps)``.
        weight: W, shape of g.
        mean: Mean of h, ``(in,)``; kernel positions share that of their channel. Finite.
        variance: Variance of h, ``(in,)``. Finite.
        groups: Groups of the convolution.

    Returns:
        Shape and dtype of g.

    Examples:
        >>> grad, weight = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
        >>> projected_weight_gradient(grad, weight, torch.tensor([0.0, 0.0, 3.0]), torch.ones(3))
        tensor([[0.0000, 1.0000, 0.1000]])
    """
    taps = grad.shape[2:].numel()
    g, w = (tensor.to(mean.dtype).reshape(groups, -1, len(mean) // groups * taps) for tensor in (grad, weight))
    tiny = torch.finfo(g.dtype).tiny

    def products(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(2, keepdim=True)

    m, s = (statistic.view(groups, 1, -1) for statistic in (mean, variance))
    square = m.square()
    length = square.sum(2, keepdim=True)  # of m at one tap
    variance_along = products(square, s) / length.clamp(min=tiny)
    m = m.repeat_interleave(taps, 2) if taps > 1 else m
    g = torch.addcmul(g, g @ (m / (variance_along + taps * length).clamp(min=tiny)).mT, m, value=-1)
    g = g.addcmul_(products(g, w) / products(w, w).clamp(min=tiny), w, value=-1)
    return g.to(grad.dtype).view_as(grad)


class FeedingLayer(InputCounter[tuple[int, Tensor, Tensor]]):
    """The layer that feeds a batchless layer; its weight's gradients and the sums over the rows of its inputs in this step.

    In a training pass the layer computes with an alias of its weight, whose gradient comes from the layer's output alone.

    Args:
        norm: The batchless layer.
        layer: The linear or (not transposed) convolution layer whose output goes there alone.
        collector: Who takes the rows.
    """

    def __init__(self, norm: BatchlessNorm, layer: nn.Linear | _ConvNd, collector: Collector) -> None:
        super().__init__(collector)
        self.norm, self.layer = norm, layer
        self.features = layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features
        self._forget()
        self._handles += [
            layer.register_forward_pre_hook(self._lend),
            layer.register_forward_hook(self._return, always_call=True),
        ]
        self._look_at(layer._parameters.get("weight"))
        self.watch(layer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Start anew: a copy of the weight has no hook."""
        self._weight: Tensor | None = None
        self._from_output: Tensor | None = None  # in a backward pass that has not come to the weight
        self._elsewhere: Tensor | None = None  # None where everything came from the layer's output
        self._along: Tensor | None = None
        self._fills = False  # whether these two are of backward passes that filled .grad, or of autograd.grad

    def discard(self) -> None:
        """Discard the rows and the gradients since the last step."""
        super().discard()
        self._from_output = self._elsewhere = self._along = None
        self._fills = False

    @attachment
    @disable_dynamo
    def _lend(self, layer: nn.Module, _: Any) -> None:
        weight = layer._parameters.get("weight")  # None where it is computed from other parameters
        trains = self.norm.training and torch.is_grad_enabled() and is_counting() and self.collector.collects
        if not trains or weight is None or not weight.requires_grad:
            return
        self._look_at(weight)
        alias = weight.view_as(weight)
        alias.register_hook(self._add_from_output)
        layer._parameters["weight"] = alias  # pyright: ignore[reportArgumentType]

    def _look_at(self, weight: Tensor | None) -> None:
        """See the gradients of the weight, also those of backward passes before the first forward."""
        if weight is not self._weight and weight is not None and weight.requires_grad:
            self._weight = weight
            self._handles.append(weight.register_hook(self._split))

    @attachment
    @disable_dynamo
    def _return(self, layer: nn.Module, *_: Any) -> None:
        if layer._parameters.get("weight") is not None and self._weight is not None:
            layer._parameters["weight"] = self._weight  # pyright: ignore[reportArgumentType]

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
        self._fills = fills
        along = self._times_weight(grad)
        self._along = along if self._along is None else self._along + along
        if output is not None and output.data_ptr() == grad.data_ptr():
            return  # all of it is from the output: nothing was added
        # a copy, since torch makes this tensor .grad and lets later backward passes add to it
        elsewhere = grad.detach().clone() if output is None else grad.detach() - output
        self._elsewhere = elsewhere if self._elsewhere is None else self._elsewhere + elsewhere

    def _times_weight(self, grad: Tensor) -> Tensor:
        """Product of a gradient with the weight, per output."""
        weight, dtype = self.layer.weight.detach(), self.norm.running_mean.dtype
        return (grad.detach().to(dtype) * weight.to(dtype)).flatten(1).sum(1)

    @attachment
    @disable_dynamo
    def _after_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not (self.norm.training and output.requires_grad and is_counting() and self.collector.collects):
            return
        x = args[0] if args else kwargs["input"]
        sums = sum_and_square_sum(x, 1 if isinstance(layer, _ConvNd) else -1)
        self.count(output, (x.numel() // self.features, *sums), layer._parameters.get("weight"))

    def take_sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums since the last call.

        Returns:
            Number of rows ``()``; sum and sum of squares of the layer's inputs ``(in,)``; the weight's gradients, all terms of
            the loss together, times the weight ``(out,)``.
        """
        like, counted, along = self.norm.running_mean.detach(), self.take(), self._along
        rows, totals, squares = (
            zip(*counted, strict=True) if counted else ([0], *([like.new_zeros(self.features)],) * 2)
        )
        total, square = (functools.reduce(torch.add, sums) for sums in (totals, squares))
        return like.new_full((), sum(rows)), total, square, torch.zeros_like(like) if along is None else along

    def project(self, mean: Tensor, variance: Tensor, along: Tensor) -> None:
        """Replace the gradient of the weight, if there is one, by the projected one.

        Unscaling and clipping multiply ``.grad`` by a factor that the gradients of single backward passes lack: it is found
        by least squares from the products of both with the weight.

        Args:
            mean: Of the layer's inputs in this step, over all ranks, ``(in,)``.
            variance: Likewise.
            along: The weight's gradients times the weight, mean over all ranks, ``(out,)``.
        """
        elsewhere, reached, weight = self._elsewhere, self._along is not None, self.layer._parameters.get("weight")
        self.discard()
        if weight is None or weight.grad is None or not reached:
            return
        groups = getattr(self.layer, "groups", 1)
        if elsewhere is None:
            weight.grad.copy_(projected_weight_gradient(weight.grad, weight.detach(), mean, variance, groups=groups))
            return
        factor = (self._times_weight(weight.grad) @ along / along.square().sum()).nan_to_num(0, 0, 0)
        elsewhere = (elsewhere * factor).to(weight.grad.dtype)
        grad = projected_weight_gradient(weight.grad - elsewhere, weight.detach(), mean, variance, groups=groups)
        weight.grad.copy_(grad + elsewhere)


def project_weights(producers: Sequence[FeedingLayer], sums: Sequence[tuple[Tensor, ...]], ranks: int) -> None:
    """Project the gradients of all producers' weights.

    Args:
        producers: The layers.
        sums: What ``FeedingLayer.take_sums`` gave for each, over all ranks. Statistics that are not finite count as zero.
        ranks: Number of ranks.
    """
    groups: dict[Any, list[tuple[FeedingLayer, tuple[Tensor, ...]]]] = {}
    for producer, own in zip(producers, sums, strict=True):
        groups.setdefault((own[1].device, own[1].dtype), []).append((producer, own))
    for group in groups.values():
        sizes = [producer.features for producer, _ in group]
        rows = per_feature([own[0] for _, own in group], sizes).clamp(min=1)
        mean, square = (torch.cat([own[k] for _, own in group]) / rows for k in (1, 2))
        variance = (square - mean.square()).clamp(min=0)
        mean, variance = (t.nan_to_num(0, 0, 0).split(sizes) for t in (mean, variance))
        for (producer, own), m, v in zip(group, mean, variance, strict=True):
            producer.project(m, v, own[3] / ranks)


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
