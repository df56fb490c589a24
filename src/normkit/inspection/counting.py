"""Count the rows of a layer's input whose gradients lie in ``.grad``, until the optimizer steps.

One :class:`RowCounter` per layer keeps what each forward pass has to say about its rows. The rows belong to the backward pass
that fills ``.grad``:

- a forward pass without gradients, or one that no backward pass reaches, never counts;
- a backward pass inside the loss (``torch.autograd.grad``: physics-informed losses, gradient penalties, MAML) does not count its
  rows; the pass that fills the gradients does;
- a forward pass counts once, however many backward passes run through it and whether checkpointing runs it again;
- the rows are dropped together with the gradients, by ``zero_grad`` or by ``grad = None``.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from normkit.inspection.compiling import disable_dynamo, guard_hooks

Rows = TypeVar("Rows")

PATIENCE = 8
"""Backward passes without a step after which a counter warns."""

_pauses = 0  # of the whole process, not of a thread: checkpointed forwards are recomputed on autograd's own threads

_logger = logging.getLogger("normkit")


@contextmanager
def no_counting() -> Iterator[None]:
    """Count no rows inside: for forward and backward passes that measure and do not train."""
    global _pauses  # noqa: PLW0603
    _pauses += 1
    try:
        yield
    finally:
        _pauses -= 1


def is_counting() -> bool:
    """Return whether forward passes count at present; layers skip their statistics when they do not.

    Inside transforms of torch.func nothing counts: what a forward sees there lives no longer than the transform.
    """
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportAttributeAccessIssue]
        _say_not_counted()
        return False
    return _pauses == 0


@disable_dynamo
@functools.lru_cache(maxsize=1)
def _say_not_counted() -> None:
    _logger.warning(
        "a forward pass inside a torch.func transform (grad, vmap, ...) counts no rows: running statistics stay as they are, "
        "and a step takes its gradients as they are"
    )


def _nearest_leaf(output: Tensor) -> Node:
    """Return the node that accumulates the gradient of the leaf nearest to ``output``."""
    queue = [get_gradient_edge(output).node]
    for node in queue:
        if not node.next_functions:
            return node
        queue += [following for following, _ in node.next_functions if following is not None and following not in queue]
    return queue[0]


def is_filled(leaf: Node) -> bool:
    """Return whether the present backward pass accumulates into the leaf (``autograd.grad`` hands gradients out)."""
    try:
        return torch._C._will_engine_execute_node(leaf)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError:  # torch's answer where ``autograd.grad`` was asked for this very leaf
        return False


class Collector:
    """The receiver of the rows that counters count.

    In a copy nobody takes them, until the copy of their owner, which steps with the copy of the optimizer, calls
    :meth:`claim`. So a model and an optimizer that are copied together go on together, and a model that is copied alone warns.

    Attributes:
        collects: Whether somebody takes the rows.
        copied: Whether this is a copy that nobody has claimed.

    Args:
        owner: Name of the method, for messages.
        remedy: How to let an optimizer take the rows, for messages.
        collects: Whether somebody takes the rows from now on.
    """

    def __init__(self, owner: str, remedy: str, *, collects: bool = True, copied: bool = False) -> None:
        self.owner, self.remedy, self.collects, self.copied = owner, remedy, collects, copied
        self._warned = False

    def __reduce__(self) -> tuple[Callable[..., "Collector"], tuple[Any, ...]]:
        return _unclaimed, (self.owner, self.remedy, self.collects or self.copied)

    def claim(self) -> None:
        """Start to collect."""
        self.collects, self.copied = True, False

    def release(self) -> None:
        """Stop collecting."""
        self.collects = False

    def warn(self, passes: int) -> None:
        """Warn once that rows are counted and nothing takes them.

        Args:
            passes: How many backward passes there were since the last step.
        """
        if self._warned or not (self.copied or passes >= PATIENCE):
            return
        self._warned = True
        if self.copied:
            fault = (
                "this copy of a model is trained without the optimizer that its layers were attached to, so the method has "
                f"no effect; copy both together, copy.deepcopy((model, optimizer)), or {self.remedy}"
            )
        elif self.collects:
            fault = (
                f"{passes} backward passes, each followed by zero_grad, and no step of the attached optimizer, so the method "
                f"has no effect; attach to the optimizer whose step() changes the weights, after remove() here: {self.remedy}"
            )
        else:
            fault = (
                f"{passes} backward passes, and no optimizer is attached, so the method has no effect; {self.remedy}"
            )
        warnings.warn(f"{self.owner}: {fault}", stacklevel=2)


def _unclaimed(owner: str, remedy: str, copied: bool) -> Collector:
    return Collector(owner, remedy, collects=False, copied=copied)


class _Forward(Generic[Rows]):
    """One forward pass, and the hook on its output.

    Attributes:
        rows: Its rows, None once they are counted.
    """

    __slots__ = ("counter", "leaf", "note", "rows", "waiting", "weight")

    def __init__(
        self,
        counter: "RowCounter[Rows]",
        rows: Rows,
        leaf: Node,
        weight: Tensor | None,
        note: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.counter, self.leaf, self.weight, self.note = counter, leaf, weight, note
        self.rows: Rows | None = rows
        self.waiting: RemovableHandle | None = None

    def __call__(self, grad: Tensor) -> None:
        """Count the rows if the backward pass that arrives here fills the gradient."""
        if self.rows is not None:
            if is_filled(self.leaf):
                self.fill()
            else:
                self._arrive_without_gradient()
        if self.note is not None:  # behind the count, which may find that earlier gradients were dropped
            self.note(grad)

    def _arrive_without_gradient(self) -> None:
        if self.weight is not None:  # torch may have made another node, in a conversion there and back
            self.leaf = self.counter.leaf_of(self.weight, anew=True)
            if is_filled(self.leaf):
                self.fill()
                return
        if self.counter.collector.collects and self.counter.note_reached(self) and torch.is_grad_enabled():
            # create_graph: a later pass may fill the gradient through this one alone
            self.waiting = self.leaf.variable.register_post_accumulate_grad_hook(self.fill)  # pyright: ignore

    def fill(self, *_: Tensor) -> None:
        """Count the rows."""
        if self.waiting is not None:
            self.waiting.remove()
        if self.rows is not None:
            rows, self.rows = self.rows, None
            self.counter.fill(rows, self.weight)


class RowCounter(Generic[Rows]):
    """Counts the rows of one layer; see the module's first lines for what counts.

    A copy starts without rows, as torch's copies of parameters start without gradients.

    Args:
        collector: Who takes the rows.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._kept: list[Rows] = []  # of outputs without gradients
        self._filled: list[Rows] = []  # of the gradients in ``.grad``
        self._reached: list[_Forward[Rows]] = []  # by backward passes that filled nothing
        self._task = -1  # the latest backward pass that filled gradients
        self._dropped = True  # whether there was none since the gradients were dropped
        self._passes = 0  # that began with no gradient, since the last step
        self._leaf: tuple[object, Node] | None = None  # found once: asking torch costs as much as counting

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": [], "_filled": [], "_reached": [], "_leaf": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.discard()
        guard_hooks()

    @property
    def pending(self) -> list[Rows]:
        """The rows that :meth:`take` would return."""
        reached = [forward.rows for forward in self._reached if forward.rows is not None]
        return self._kept + self._filled or reached

    def count(
        self,
        output: Tensor,
        rows: Rows,
        weight: Tensor | None = None,
        *,
        note: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Count ``rows`` once a backward pass through ``output`` fills the gradient of ``weight``.

        Args:
            output: Output of the layer. Without gradients the rows count at once, and no ``zero_grad`` drops them.
            rows: What the forward pass has to say about its rows.
            weight: A parameter of the layer; default the parameter nearest to ``output`` in the graph.
            note: Called with the gradient of ``output`` in every backward pass.
        """
        if not output.requires_grad:
            self._note_pass()
            if self.collector.collects:
                self._kept.append(rows)
            return
        if weight is None or not weight.requires_grad:
            leaf, weight = _nearest_leaf(output), None
        elif weight.grad_fn is not None:  # computed from parameters, as in MAML's inner steps
            leaf, weight = _nearest_leaf(weight), None
        else:
            leaf = self.leaf_of(weight)
        output.register_hook(_Forward(self, rows, leaf, weight, note))

    def leaf_of(self, weight: Tensor, *, anew: bool = False) -> Node:
        """Return the node that accumulates the gradient of ``weight``; torch makes a new one when the weight is converted."""
        key = id(weight), weight.device, weight.dtype
        if anew or self._leaf is None or self._leaf[0] != key:
            self._leaf = key, get_gradient_edge(weight).node
        return self._leaf[1]

    def note_reached(self, forward: _Forward[Rows]) -> bool:
        """Note that a backward pass reached the forward without filling the gradient; return whether it is the first one."""
        new = forward not in self._reached
        if new:
            self._reached.append(forward)
        return new

    def discard(self) -> None:
        """Forget the rows whose gradients were dropped."""
        self._filled.clear()
        self._dropped = True

    def take(self) -> list[Rows]:
        """Return the rows of the forward passes that counted since the last call, one entry for each.

        Where no backward pass filled the gradient (``p.grad = autograd.grad(...)`` assigns it), the rows that ``autograd.grad``
        reached count.
        """
        self._passes = 0
        if not (self._kept or self._reached):
            taken, self._filled = self._filled, []
            return taken
        taken = self.pending
        for forward in self._reached:
            forward.rows = None
        self._kept, self._filled, self._reached = [], [], []
        return taken

    def receive(self, rows: Rows) -> None:
        """Take rows that another counter counted for this one."""
        self._filled.append(rows)

    def fill(self, rows: Rows, weight: Tensor | None) -> None:
        """Count rows whose gradients the present backward pass accumulates.

        Args:
            rows: The rows.
            weight: The layer's own weight, or None.
        """
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportAttributeAccessIssue]
        if task != self._task:
            self._task = task
            if weight is not None and not self._dropped and weight.grad is None:
                self.discard()
            if self._dropped or not self.collector.collects:
                self._note_pass()
            self._dropped = False
        if self.collector.collects:
            self._filled.append(rows)

    def _note_pass(self) -> None:
        self._passes += 1
        if self.collector.copied or self._passes >= PATIENCE:
            self.collector.warn(self._passes)


class InputCounter(RowCounter[Rows]):
    """Counts the rows of a layer's input in a forward hook, :meth:`_after_forward`."""

    always_called = False
    """Whether the hook is called where the forward fails, too, with None for the output."""

    def __init__(self, collector: Collector) -> None:
        super().__init__(collector)
        self._handles: list[RemovableHandle] = []

    def watch(self, layer: nn.Module) -> None:
        """Hook into ``layer``, and remove unclaimed hooks that a copy brought along."""
        for other in input_counters(layer):
            if other.collector.copied:
                other.remove()
        guard_hooks()
        self._handles.append(
            layer.register_forward_hook(self._after_forward, with_kwargs=True, always_call=self.always_called)
        )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _after_forward(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Count the rows of one forward."""
        raise NotImplementedError


def input_counters(layer: nn.Module) -> list[InputCounter[Any]]:
    """Return the counters that are hooked into ``layer``."""
    owners = [getattr(hook, "__self__", None) for hook in layer._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, InputCounter)]
