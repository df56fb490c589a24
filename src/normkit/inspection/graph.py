"""Trace the data flow of a model, as far as it can be known.

A model is traced symbolically with torch.fx; where it does not trace (control flow on data, keyword-only calls,
...) its children are traced one by one and what is found is united, so that a convolution and the normalization
behind it inside one block are found however wild the outer loop is. With an example input the model can be run
instead, see ``normkit.inspection.record``.
"""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normkit.inspection.markers import Leaf
from normkit.inspection.norms import PRODUCERS, aligned, feature_dim, is_frozen_norm, is_norm, takes_maps
from normkit.inspection.references import copy_detached

_WRAPPERS = (DataParallel, DistributedDataParallel)
_RECTIFIERS = {"relu", "relu6", "threshold"}
_SAME_DIMENSIONS = {
    *_RECTIFIERS,
    "add",
    "sub",
    "mul",
    "truediv",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "dropout",
    "contiguous",
}
_RESIZING = {"pooling", "padding", "upsampling"}
_ADAPTIVE = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "stride", "is_floating_point"}


def is_leaf(module: nn.Module) -> bool:
    """Return whether a trace treats ``module`` as one step: layers of torch.nn, their subclasses, and ours."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if isinstance(module, PRODUCERS) or is_norm(module) or is_frozen_norm(module):
        return True
    return isinstance(module, Leaf) or type(module).__module__.startswith("torch.nn.")


@dataclass(frozen=True)
class Step:
    """One operation of a traced model.

    Attributes:
        name: ``input``, ``output``, ``module``, ``attribute`` (a parameter or buffer used directly) or the plain
            name of a function, such as ``add`` (also ``+``, ``+=``, ``add_``), ``relu``, ``flatten``.
        inputs: Indices of the steps whose tensors it takes, each once, in the order of the arguments.
        path: Path of the module or attribute, else None. A module that stands at several paths has the first of them.
    """

    name: str
    inputs: tuple[int, ...]
    path: str | None = None


@dataclass(frozen=True)
class Dataflow:
    """The steps of a model in execution order; several pieces in a row where only parts of it traced.

    Each piece begins with its own ``input`` steps and ends with an ``output`` step: what comes before and after is
    unknown.

    Attributes:
        steps: The steps.
        opaque: Paths of the modules whose own forward is not among them, as it did not trace.
    """

    steps: tuple[Step, ...]
    opaque: tuple[str, ...] = ()

    @cached_property
    def _consumers(self) -> tuple[tuple[int, ...], ...]:
        table: list[list[int]] = [[] for _ in self.steps]
        for index, step in enumerate(self.steps):
            for source in step.inputs:
                table[source].append(index)
        return tuple(map(tuple, table))

    def consumers(self, index: int) -> tuple[int, ...]:
        """Return the indices of the steps that take the output of step ``index``."""
        return self._consumers[index]

    @cached_property
    def ancestors(self) -> tuple[frozenset[int], ...]:
        """Return for each step all steps that its output depends on."""
        table: list[frozenset[int]] = []
        for step in self.steps:
            table.append(frozenset(step.inputs).union(*(table[i] for i in step.inputs)))
        return tuple(table)

    def calls(self, path: str) -> tuple[int, ...]:
        """Return the indices of the steps that call the module ``path`` (none where the trace did not reach it)."""
        return self._calls.get(path, ())

    @cached_property
    def _calls(self) -> dict[str, tuple[int, ...]]:
        table: dict[str, tuple[int, ...]] = {}
        for index, step in enumerate(self.steps):
            if step.name == "module" and step.path is not None:
                table[step.path] = (*table.get(step.path, ()), index)
        return table


def dataflow(model: nn.Module) -> Dataflow:
    """Return the data flow of ``model``, which is neither run nor changed.

    Examples:
        >>> flow = dataflow(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        >>> [(step.name, step.path, step.inputs) for step in flow.steps]
        [('input', None, ()), ('module', '0', (0,)), ('module', '1', (1,)), ('output', None, (2,))]
    """
    paths = {module: path for path, module in model.named_modules()}
    steps: list[Step] = []
    opaque: list[str] = []
    for root, graph in _pieces(model, set()):
        if graph is None:
            opaque.append(paths[root])
        else:
            _append(steps, root, graph, paths)
    return Dataflow(tuple(steps), tuple(opaque))


def producers(model: nn.Module, flow: Dataflow | None = None) -> dict[str, str]:
    """Return for each normalization layer the linear or convolution layer that feeds it alone.

    A layer that is called several times counts when each of its calls is consumed by that normalization alone. A batch
    normalization over another dimension than the outputs of a linear layer (L channels of ``(N, L, C)``) has no producer.

    Args:
        model: Any module.
        flow: Its data flow, when it is known already.

    Returns:
        ``{path of the normalization: path of the producer}``; a normalization without such a producer is absent.

    Examples:
        >>> producers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
        {'1': '0'}
    """
    flow = dataflow(model) if flow is None else flow
    modules = dict(model.named_modules())
    pairs = {path: source_of(flow, modules, path) for path, module in modules.items() if is_norm(module)}
    return {
        norm: source
        for norm, source in pairs.items()
        if source and isinstance(layer := modules[source], PRODUCERS) and aligned(layer, modules[norm])
        if feature_dim(modules[norm]) == -1 or not works_on_positions(flow, modules, source)
    }


def works_on_positions(flow: Dataflow, modules: dict[str, nn.Module], path: str) -> bool:
    """Return whether ``path`` is a linear layer that takes maps ``(N, C, ...)``; its features are then not channels."""
    return isinstance(modules[path], nn.Linear) and any(_is_map(flow, modules, call) for call in flow.calls(path))


def _is_map(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> bool:
    """Whether the output of a step is known to have positions beside channels, as that of a convolution has."""
    while True:
        step = flow.steps[index]
        module = modules.get(step.path or "") if step.name == "module" else None
        if isinstance(module, _ConvNd) or (module is not None and takes_maps(module)):
            return True
        kept = step.name in _SAME_DIMENSIONS if module is None else _keeps_dimensions(module)
        if not kept or not step.inputs:
            return False
        index = step.inputs[0]


def has_one_position(flow: Dataflow, modules: dict[str, nn.Module], path: str) -> bool | None:
    """Return whether a module takes one value per channel and sample at every call; None where that is not known."""
    answers = {_one_position(flow, modules, index) for index in flow.calls(path)}
    return answers.pop() if len(answers) == 1 else None


def _one_position(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> bool | None:
    while flow.steps[index].inputs:
        index = flow.steps[index].inputs[0]
        step = flow.steps[index]
        module = modules.get(step.path or "") if step.name == "module" else None
        if isinstance(module, nn.Linear):
            return None if _is_map(flow, modules, index) else True
        if isinstance(module, _ADAPTIVE):
            size = module.output_size
            return all(extent == 1 for extent in (size if isinstance(size, tuple) else (size,)))
        if isinstance(module, _ConvNd):
            if any(k > 1 for k in module.kernel_size) or not (
                isinstance(module.padding, str) or not any(module.padding)
            ):
                return False
        elif len(step.inputs) > 1 or not (
            step.name in _SAME_DIMENSIONS if module is None else _keeps_positions(module)
        ):
            return None  # sums and products may broadcast
    return None


def _keeps_positions(module: nn.Module) -> bool:
    return _keeps_dimensions(module) and type(module).__module__.rpartition(".")[2] not in _RESIZING


def _keeps_dimensions(module: nn.Module) -> bool:
    kinds = ("activation", "dropout", *_RESIZING)
    own = type(module).__module__ in [f"torch.nn.modules.{kind}" for kind in kinds] and not any(module.children())
    return own or is_norm(module) or isinstance(module, nn.Linear | nn.Identity)


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the normalization, linear and convolution layers with their paths."""
    return [(name, m) for name, m in model.named_modules() if is_norm(m) or isinstance(m, PRODUCERS)]


def rectified(model: nn.Module) -> frozenset[str]:
    """Return the paths of the layers whose output goes to a ReLU alone, as far as the model traces."""
    flow, modules = dataflow(model), dict(model.named_modules())

    def rectifies(index: int) -> bool:
        step = flow.steps[index]
        if step.name == "module" and step.path is not None:
            return isinstance(modules[step.path], nn.ReLU | nn.ReLU6)
        return step.name in _RECTIFIERS

    def ends_in_relu(index: int) -> bool:
        consumers = flow.consumers(index)
        return len(consumers) == 1 and rectifies(consumers[0])

    return frozenset(n for n, _ in layers(model) if flow.calls(n) and all(map(ends_in_relu, flow.calls(n))))


def source_of(flow: Dataflow, modules: dict[str, nn.Module], path: str) -> str | None:
    """Return the module that feeds ``path`` alone at every call of both; identities are skipped.

    Args:
        flow: A data flow.
        modules: ``dict(model.named_modules())``; a layer that has become an identity since the trace counts as one.
        path: Path of a module.

    Returns:
        Path of the other module, or None.
    """
    sources = {_before(flow, modules, call) for call in flow.calls(path)}
    source = sources.pop() if len(sources) == 1 else None
    return source if source is not None and sole_consumer(flow, modules, source) == path else None


def sole_consumer(flow: Dataflow, modules: dict[str, nn.Module], path: str) -> str | None:
    """Return the only module that takes the output of ``path``, at every call; identities are skipped."""
    consumers = {_after(flow, modules, call) for call in flow.calls(path)}
    return consumers.pop() if len(consumers) == 1 else None


def _before(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> str | None:
    while flow.steps[index].inputs:
        index = flow.steps[index].inputs[0]
        step = flow.steps[index]
        if not _is_identity(step, modules):
            return step.path if step.name == "module" else None
    return None


def _after(flow: Dataflow, modules: dict[str, nn.Module], index: int) -> str | None:
    while len(flow.consumers(index)) == 1:
        index = flow.consumers(index)[0]
        step = flow.steps[index]
        if not _is_identity(step, modules):
            return step.path if step.name == "module" else None
    return None


def _is_identity(step: Step, modules: dict[str, nn.Module]) -> bool:
    if step.name == "module" and step.path is not None:
        module = modules[step.path]
        return isinstance(module, nn.Identity) and not any(True for _ in module.parameters()) and not has_hooks(module)
    return step.name == "contiguous"


def has_hooks(module: nn.Module) -> bool:
    """Return whether something may change what goes into the module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(m, _WRAPPERS):
            return m.module(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _pieces(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[nn.Module, fx.Graph | None]]:
    """The largest parts of ``module`` that trace, with their graphs, and what holds them.

    Yields:
        A module and its graph, or None where its own forward does not trace.
    """
    while isinstance(module, _WRAPPERS):
        module = module.module
    if module in seen or is_leaf(module):
        return
    seen.add(module)
    try:
        graph = _symbolic(module)
    except Exception:  # a forward may raise anything when it meets symbols instead of tensors
        yield module, None
        for child in module.children():
            yield from _pieces(child, seen)
    else:
        yield module, graph


def deciding_defaults(model: nn.Module) -> list[str]:
    """Return the switches among the arguments of forward whose other value takes another path, as ``name=default``.

    Examples:
        >>> class Net(nn.Module):
        ...     def forward(self, x, twice=False, unused=False):
        ...         return 2 * x if twice else x
        >>> deciding_defaults(Net())
        ['twice=False']
    """
    found = []
    for root, graph in _pieces(model, set()):
        if graph is None:
            continue
        for name, default in _defaults(root).items():
            if isinstance(default, bool):
                try:
                    other = _symbolic(root, **{name: not default})
                except Exception:  # as in _pieces
                    other = None
                if other is None or _operations(other) != _operations(graph):
                    found.append(f"{name}={default}")
    return found


def _operations(graph: fx.Graph) -> list[tuple[str, str, tuple[str, ...]]]:
    called = [node for node in graph.nodes if node.op != "placeholder"]
    return [(node.op, str(node.target), tuple(source.name for source in node.all_input_nodes)) for node in called]


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _symbolic(module: nn.Module, **arguments: Any) -> fx.Graph:
    clone = _scratch_copy(module)
    defaults = _defaults(module) | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx warns about defaults that it cannot guard; nobody runs this graph
        return _Tracer().trace(clone, concrete_args=defaults)


def _scratch_copy(module: nn.Module) -> nn.Module:
    """A copy that a trace may execute: parameters shared, buffers and attributes its own, without any hooks."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks"):
                memo[id(value)] = OrderedDict()
    return copy_detached(module, memo)


def _append(steps: list[Step], root: nn.Module, graph: fx.Graph, paths: dict[nn.Module, str]) -> None:
    index: dict[fx.Node, int] = {}
    metadata: set[fx.Node] = set()
    prefix = paths[root] + "." if paths[root] else ""
    for node in graph.nodes:
        sources = node.all_input_nodes
        if _is_metadata(node) or (sources and all(source in metadata for source in sources)):
            metadata.add(node)
            continue
        path = None
        if node.op == "call_module":
            path = paths[root.get_submodule(str(node.target))]
        elif node.op == "get_attr":
            path = prefix + str(node.target)
        index[node] = len(steps)
        steps.append(Step(_name(node), tuple(index[s] for s in sources if s in index), path))


def _is_metadata(node: fx.Node) -> bool:
    """Whether the node reads a tensor's shape, dtype, ..., not its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


def _name(node: fx.Node) -> str:
    fixed = {"placeholder": "input", "output": "output", "call_module": "module", "get_attr": "attribute"}
    if node.op in fixed:
        return fixed[node.op]
    if node.target is getattr:
        return str(node.args[1])
    return plain_name(
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    )


def plain_name(name: str) -> str:
    """Return one name per operation: ``add`` for ``add_``, ``__add__``, ``iadd`` and ``add``."""
    name = name.strip("_")
    aliases = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "isub": "sub", "itruediv": "truediv"}
    return aliases.get(name, name)
