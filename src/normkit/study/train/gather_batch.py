"""Synchronized batch statistics: a layer that normalizes by its batch sees the batch of all ranks, not its rank's share.

So batch normalization in a study under torchrun is synchronized batch normalization, and a batch size means the same on any
number of ranks, for every method. Each such layer is given the rows of all ranks and hands on its own; that costs two
all-reduces of its input per step, where SyncBatchNorm exchanges statistics alone, but it holds for any statistics (l_p norms,
bounded corrections, online input normalization) and on any device.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.inspection.compiling import disable_dynamo
from normkit.inspection.markers import attachment
from normkit.inspection.norms import uses_batch_statistics


class WholeBatch:
    """Gives the layers of ``model`` that normalize by batch statistics all ranks' rows, whenever ``network`` trains.

    Args:
        network: Whose forward passes count, each called with a batch and its number of samples: evaluation and other passes
            that call ``model`` itself stay on their own.
        model: The model in it.
    """

    def __init__(self, network: nn.Module, model: nn.Module) -> None:
        self._sizes: list[int] | None = None  # examples of each rank while the network runs
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end, always_call=True)
        for module in model.modules():
            if uses_batch_statistics(module):
                module.register_forward_pre_hook(self._gather, with_kwargs=True)
                module.register_forward_hook(self._own)

    @attachment
    @disable_dynamo
    def _begin(self, network: nn.Module, args: tuple[Any, int]) -> None:
        if network.training:
            device = next(network.parameters()).device
            sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
            sizes[dist.get_rank()] = args[1]
            dist.all_reduce(sizes)
            self._sizes = sizes.tolist()

    @attachment
    def _end(self, *_: Any) -> None:
        self._sizes = None

    @attachment
    @disable_dynamo
    def _gather(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._sizes is None or not layer.training:
            return None
        x, *rest = args or kwargs.values()
        start, stop, total = self._rows(len(x))
        rows = _AllRows.apply(x, start, stop, total)
        return ((rows, *rest), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): rows})

    @attachment
    @disable_dynamo
    def _own(self, layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if self._sizes is None or not layer.training:
            return None
        share = len(y) * self._sizes[dist.get_rank()] // sum(self._sizes)
        start, stop, _total = self._rows(share)
        return y[start:stop]

    def _rows(self, own: int) -> tuple[int, int, int]:
        """Return begin and end of this rank's ``own`` rows among all, and the number of all; a sample may have several rows."""
        assert self._sizes is not None
        rank = dist.get_rank()
        each = own // self._sizes[rank]
        start = each * sum(self._sizes[:rank])
        return start, start + own, each * sum(self._sizes)


class _AllRows(torch.autograd.Function):
    """The rows of all ranks; backward, the sum over ranks of what their losses say about this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int, total: int) -> Tensor:
        ctx.own = start, stop
        rows = x.new_zeros(total, *x.shape[1:])
        rows[start:stop] = x
        dist.all_reduce(rows)
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return rows.contiguous(memory_format=torch.channels_last) if last else rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        start, stop = ctx.own
        return grad[start:stop], None, None, None
