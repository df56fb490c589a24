"""Record the data flow of a model on an example input, for models that cannot be traced symbolically."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from normkit.inspection.forward import Forward, evaluating, run_batch
from normkit.inspection.graph import Dataflow, Step, is_leaf, plain_name


def record(model: nn.Module, batch: Any, *, forward: Forward = run_batch) -> tuple[Dataflow, Any]:
    """Run ``model`` on ``batch`` in eval mode and record every operation.

    Args:
        model: Any module that runs eagerly.
        batch: One batch.
        forward: How to run the model on it.

    Returns:
        The data flow, and what the model returned. Tensors that change through a view of them are not followed.
    """
    recorder = _Recorder(model)
    handles: list[RemovableHandle] = []
    try:
        for module in model.modules():
            if is_leaf(module):
                handles.append(module.register_forward_pre_hook(recorder.enter, prepend=True))
                handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
        with evaluating(model), recorder:
            output = forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    recorder.note("output", output, ())
    return Dataflow(tuple(recorder.steps)), output


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.attributes = {id(t): path for path, t in (*model.named_parameters(), *model.named_buffers())}
        self.steps: list[Step] = []
        self.at: dict[int, int] = {}
        self.alive: list[Tensor] = []  # an id means a tensor only as long as the tensor lives
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.depth == 0:
            name = plain_name(getattr(func, "__name__", str(func)))
            self.note(name, (args, kwargs), args[0] if name == "setitem" else output)
        return output

    def enter(self, *_: Any) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.note("module", (args, kwargs), output, self.paths[module])

    def note(self, name: str, inputs: Any, output: Any, path: str | None = None) -> None:
        made = list(tensors_in(output))
        if not made and name != "output":
            return  # it read a shape, not values
        sources = tuple(dict.fromkeys(self._source(tensor) for tensor in tensors_in(inputs)))
        self.steps.append(Step(name, sources, path))
        for tensor in made:
            self.at[id(tensor)] = len(self.steps) - 1
            self.alive.append(tensor)

    def _source(self, tensor: Tensor) -> int:
        if id(tensor) not in self.at:
            path = self.attributes.get(id(tensor))
            self.steps.append(Step("input" if path is None else "attribute", (), path))
            self.at[id(tensor)] = len(self.steps) - 1
            self.alive.append(tensor)
        return self.at[id(tensor)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Return all tensors in nested mappings, tuples and lists.

    Yields:
        The tensors, in order.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def tensor_in(value: Any) -> Tensor | None:
    """Return the first floating-point tensor of two or more dimensions in a module's input or output."""
    if isinstance(value, Tensor):
        return value if value.ndim > 1 and value.is_floating_point() else None
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return next((t for t in map(tensor_in, value) if t is not None), None)
    return None
