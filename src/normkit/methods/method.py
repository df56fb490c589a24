"""The parts that methods are made of: layers that batch normalization converts to."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from normkit.inspection.norms import NormTraits, running_tensors
from normkit.moments import keep_fp32

_Layer = TypeVar("_Layer", bound="Successor")


class Successor(NormTraits):
    """A layer that takes the place of a batch normalization; a mixin.

    Attributes:
        carries: Settings that mean the same as batch normalization's of the same name.
    """

    carries: ClassVar[tuple[str, ...]] = ("eps",)

    @classmethod
    def from_batchnorm(cls: type[_Layer], norm: nn.Module, *args: Any, **settings: Any) -> _Layer:
        """A layer with the parameter objects, the running statistics and the mode of ``norm``.

        In eval mode it computes what ``norm`` computes, if it evaluates by running statistics. Without such in ``norm``
        they start at (0, 1).

        Args:
            norm: A batch normalization whose channels are known.
            *args: Further arguments of the layer, after the number of features.
            **settings: Likewise, by name.

        Returns:
            The new layer; optimizers that hold the parameters of ``norm`` go on with them.

        Raises:
            TypeError: ``norm`` is no batch normalization, or a lazy one that has seen no input.
        """
        if not isinstance(norm, _BatchNorm) or any(is_lazy(t) for t in (*norm.parameters(), *norm.buffers())):
            raise TypeError(f"from_batchnorm: expected a BatchNorm layer with known channels, got {norm}")
        like = next(iter((*norm.parameters(), *norm.buffers())), torch.empty(0))
        carried = {name: getattr(norm, name) for name in cls.carries}
        own: dict[str, Any] = {"affine": norm.affine, "device": like.device, "dtype": like.dtype, **carried, **settings}
        layer: Any = cls(norm.num_features, *args, **own)  # pyright: ignore[reportCallIssue]
        if own["affine"]:
            share_affine(norm, layer)
        for name, tensor in running_tensors(norm).items():
            if name in layer._buffers:
                layer._buffers[name] = tensor.clone()
            elif name in layer._parameters:
                layer._parameters[name].data.copy_(tensor)
        return layer.train(norm.training)


def share_affine(source: nn.Module, new: nn.Module) -> None:
    """Let ``new`` hold the ``weight`` and ``bias`` of ``source``, the same objects; None where there is none."""
    for name in ("weight", "bias"):
        setattr(new, name, source._parameters.get(name))
    if "affine" in vars(new):
        vars(new)["affine"] = new.weight is not None


class WideStatistics(nn.Module):
    """A layer whose running statistics stay in fp32 or wider whatever ``half()`` makes of the rest; a mixin.

    Attributes:
        wide: Names of the tensors that stay so.
    """

    wide: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = [getattr(self, name).data for name in self.wide]
        super()._apply(fn, recurse)
        for name, old in zip(self.wide, before, strict=True):
            statistic = getattr(self, name)
            statistic.data = keep_fp32(statistic.data, old)
        return self
