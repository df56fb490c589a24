"""Run a model: on a batch, without being observed, with hooks on some layers, or layer after layer."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from normkit.inspection.counting import no_counting
from normkit.inspection.norms import observe_input
from normkit.inspection.probe import Probe
from normkit.moments import Moments, Tally

Forward = Callable[[nn.Module, Any], Any]
Hook: TypeAlias = Callable[[str, nn.Module, Any, Any], None]
_Layer = TypeVar("_Layer", bound=nn.Module)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Return the model's output on a batch: keyword arguments from a mapping, the first entry of a tuple or list."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def check_batches(batches: Any, caller: str) -> None:
    """Refuse one batch where an iterable of batches belongs: its rows would be taken for batches.

    Raises:
        ValueError: ``batches`` is a tensor, or no iterable; None is none given.
    """
    if not isinstance(batches, Iterable | None):
        raise ValueError(f"{caller}: batches is a {type(batches).__name__}; give several batches, such as a list")
    if isinstance(batches, Tensor):
        raise ValueError(f"{caller}: batches is one tensor of shape {tuple(batches.shape)}; give several, or [batch]")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode, unobserved and with constant parameters, within the block; then restore all modes.

    Gradients are enabled: a model may differentiate by its input (forces). With constant parameters nothing else is recorded.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), no_counting():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def layerwise(
    model: nn.Module, layers: Sequence[_Layer], batches: Sequence[Any], forward: Forward = run_batch
) -> Iterator[tuple[_Layer, Moments]]:
    """Run ``model`` on all batches once per layer, in the order in which the first batch reaches the layers.

    Whoever takes a layer's moments can change the layer before the next one is looked at. Each run ends where the layer
    has had its last input.

    Args:
        model: The model, in the mode in which it is to run.
        layers: Layers of it. A second argument of theirs, or ``mask``, tells which rows count.
        batches: The batches.
        forward: How to run the model on a batch.

    Yields:
        A layer that was reached, and the merged :func:`normkit.inspection.norms.observe_input` of all its inputs.
    """
    for layer, calls in _calls(model, layers, batches[0], forward).items():
        seen = Tally()
        for batch in batches:
            _observe_inputs(model, layer, calls, batch, forward, seen)
        moments = seen.take()
        if moments is not None:
            yield layer, moments


class _Enough(Exception):
    """Leaves a forward pass once the layer of interest has been reached."""


def _calls(model: nn.Module, layers: Sequence[_Layer], batch: Any, forward: Forward) -> dict[_Layer, int]:
    """How often each layer is called in one forward pass, in the order of the first call."""
    order: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda module, _: order.append(module)) for layer in layers]
    try:
        forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: order.count(layer) for layer in sorted(set(layers) & set(order), key=order.index)}


def _observe_inputs(model: nn.Module, layer: nn.Module, calls: int, batch: Any, forward: Forward, seen: Tally) -> None:
    """Count the moments of what reaches ``layer``; the pass ends with the layer's last call."""
    left = calls

    @torch.no_grad()
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        x = args[0] if args else next(iter(kwargs.values()))
        seen.add(observe_input(layer, x, mask))
        left -= 1
        if left == 0:
            raise _Enough

    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        forward(model, batch)
    except _Enough:
        pass
    finally:
        hook.remove()


@contextmanager
def watched(
    layers: Iterable[tuple[str, nn.Module]], after: Hook | None = None, *, before: Hook | None = None
) -> Generator[None, None, None]:
    """Call ``after(name, module, inputs, output)`` and ``before(name, module, inputs, None)`` at every forward.

    The calls record no gradients.
    """

    @torch.no_grad()
    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert before is not None
        before(name, module, (args, kwargs), None)

    @torch.no_grad()
    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert after is not None
        after(name, module, (args, kwargs), output)

    handles = []
    try:
        for name, module in layers:
            if before is not None:
                handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Owner(NamedTuple):
    """A module that runs, and the parameters that it uses without calling another module.

    Attributes:
        path: Its path in the model.
        module: The module.
        parameters: Its own, those behind its parametrizations, and those of modules in it that are never called.
    """

    path: str
    module: nn.Module
    parameters: list[nn.Parameter]


def in_order(probe: Probe) -> list[Owner]:
    """Return the modules that use parameters, in the order in which a forward pass first reaches them."""
    called: dict[str, nn.Module] = {}

    def enter(name: str, module: nn.Module, _: Any, __: Any) -> None:
        called.setdefault(name, module)

    modules = [(n, m) for n, m in probe.model.named_modules() if not isinstance(m, ParametrizationList)]
    with watched(modules, before=enter):
        loss = probe.loss()
    owned = {path: list(module.parameters(recurse=False)) for path, module in called.items()}
    elsewhere = {
        parameter: path
        for path, module in probe.model.named_modules()
        for parameter in (module.parameters(recurse=False) if path not in called else ())
        if parameter.requires_grad
    }
    if elsewhere and called:
        gradients = probe.backward(loss, [*elsewhere])
        for (parameter, path), gradient in zip(elsewhere.items(), gradients, strict=True):
            while path and path not in owned:
                path = path.rpartition(".")[0]
            if gradient is not None and path in owned:
                owned[path].append(parameter)
    return [Owner(path, module, owned[path]) for path, module in called.items() if owned[path]]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block neither torch's dropout layers nor its functions drop anything, also those in attention and LSTMs.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                stack.callback(setattr, module, "training", module.training)
                module.training = False
            elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
                stack.callback(setattr, module, "dropout", module.dropout)
                module.dropout = 0.0
        stack.enter_context(_KeepAll())
        yield


class _KeepAll(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPPING:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:  # (query, key, value, attn_mask, dropout_p, ...)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {} if len(args) > 4 else {"dropout_p": 0.0}
        return func(*args, **kwargs)


_DROPPING = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.feature_dropout,
    torch.alpha_dropout,
    torch.feature_alpha_dropout,
}
