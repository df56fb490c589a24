"""Measure a model without disturbing it: the rules that every instrument follows.

A measurement works on private copies of parameters and buffers, so that the training it watches finds its own tensors,
bit for bit, also when the measurement fails; gradients, random states, train/eval flags and what the methods have
observed stay as they were.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normkit.inspection.counting import no_counting

_Batch = TypeVar("_Batch")
Objective = Callable[[nn.Module, Any], Tensor]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def random_states(model: nn.Module) -> Callable[[], None]:
    """Save every random state that a forward pass may use; the returned function restores them."""
    cpu, python = torch.get_rng_state(), random.getstate()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    numpy = sys.modules.get("numpy")  # whoever draws from it has imported it
    array = numpy.random.get_state() if numpy else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        for device, state in cuda:
            torch.cuda.set_rng_state(state, device)
        if numpy:
            numpy.random.set_state(array)

    return restore


def undisturbed(model: nn.Module, batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """Draw batches; the random states, which a loader that shuffles uses, are afterwards as before.

    Yields:
        The batches.
    """
    restore = random_states(unwrap(model))
    try:
        yield from batches
    finally:
        restore()


class Probe:
    """Loss and gradients of a model on one batch, again and again, without disturbing the model.

    Inside the context the model holds copies of its parameters and buffers. Every evaluation starts from the same
    buffers and random states, so that two of them differ by the weights alone (dropout masks, noise and power
    iterations are the same). A model in ``DistributedDataParallel`` is evaluated on every rank's own batch, and losses
    and gradients are averaged over the ranks; all ranks must take part.

    Args:
        model: Any module whose parameters are initialised.
        objective: ``loss = objective(model, batch)``, a scalar.
        batch: Whatever the objective understands.

    Raises:
        ValueError: The model is or holds a scripted module.
    """

    def __init__(self, model: nn.Module, objective: Objective, batch: Any) -> None:
        self.model = unwrap(model)
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f"{path or 'the model'} is a scripted module, whose tensors cannot be exchanged for copies; measure the "
                    "model before scripting it"
                )
        self.objective, self.batch = objective, batch
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        distributed = isinstance(model, DistributedDataParallel)
        self.group = model.process_group if distributed else None
        self.world = dist.get_world_size(self.group) if distributed else 1

    def __enter__(self) -> "Probe":
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            self._save(stack)
            stack.enter_context(no_counting())
            if "torch._dynamo" in sys.modules:  # compiled code passes over new hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(torch.clear_autocast_cache)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _save(self, stack: ExitStack) -> None:
        self._restore_random = random_states(self.model)
        stack.callback(self._restore_random)
        copies: dict[int, Tensor] = {}

        def copy(tensor: Tensor) -> Tensor:
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    "the model has parameters that are not initialised yet; run one batch through it first"
                )
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().clone()
            return copies[id(tensor)]

        self._pairs: list[tuple[Tensor, Tensor]] = []  # (original, copy) of buffers and of plain tensors
        self._names: list[tuple[dict[str, Any], dict[str, Any]]] = []  # what the names of a module stand for within
        for module in self.model.modules():
            stack.callback(setattr, module, "training", module.training)
            for names in (module._buffers, vars(module)):
                before = _values(names)
                stack.callback(_refill, names, before)
                tensors = {name: copy(t) for name, t in before.items() if isinstance(t, Tensor)}
                self._pairs += [(before[name], private) for name, private in tensors.items()]
                self._names.append((names, before | tensors))
        self._weights: dict[Tensor, Tensor] = {}  # parameter -> its data outside
        for parameter in self.model.parameters():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            self._weights[parameter] = parameter.data
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = copy(parameter)
            parameter.grad = None

    def move(self, directions: Sequence[Tensor], length: float, parameters: Sequence[Tensor] | None = None) -> None:
        """Set ``parameters`` (default all trainable ones) to ``theta + length * direction``."""
        for parameter, direction in zip(parameters or self.parameters, directions, strict=True):
            torch.add(self._weights[parameter], direction, alpha=length, out=parameter.data)

    def place(self, values: Mapping[Any, Tensor]) -> None:
        """Set parameters to other values; those not named are restored."""
        for parameter, original in self._weights.items():
            parameter.data.copy_(values.get(parameter, original))

    def loss(self) -> Tensor:
        """Return the objective, from the same buffers and random states every time.

        Gradients are enabled, since an objective may differentiate inside (forces, gradient penalties).

        Raises:
            ValueError: The objective returns no scalar tensor.
        """
        self._restore_random()
        for names, values in self._names:
            _refill(names, values)
        for original, private in self._pairs:
            private.copy_(original)
        torch.clear_autocast_cache()  # it would hold casts of the weights before they were moved
        with (
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):  # of reentrant checkpointing, about forward passes without gradients
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            loss = self.objective(self.model, self.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"objective(model, batch) must return a scalar tensor, got {got}; return loss.mean()?")
        return loss.reshape(())

    def gradients(self, parameters: Sequence[Tensor] | None = None) -> tuple[float, list[Tensor]]:
        """Return loss and gradients.

        Args:
            parameters: Default all trainable ones.

        Returns:
            The loss, and one gradient per parameter: zeros where the loss does not depend on it.

        Raises:
            ValueError: There is nothing to differentiate.
            RuntimeError: Whatever autograd says.
        """
        wanted = list(self.parameters if parameters is None else parameters)
        if not wanted:
            raise ValueError("the model has no trainable parameters (requires_grad=True), so there is no gradient")
        loss = self.loss()
        gradients = self.backward(loss, wanted)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True)]
        return self.mean(loss), [self._mean(g) for g in found]

    def backward(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of a loss that was just computed, and accumulate none.

        Args:
            loss: What :meth:`loss` returned.
            parameters: What to differentiate by.

        Returns:
            One dense gradient per parameter, None where the loss does not depend on it.

        Raises:
            RuntimeError: Whatever autograd says.
        """
        with torch.enable_grad():
            try:
                found: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError as error:
                if "heckpoint" not in str(error) or ".grad()" not in str(error):
                    raise
                self.loss().backward()  # reentrant activation checkpointing knows .backward() only
                found = [p.grad for p in parameters]
                for parameter in self._weights:
                    parameter.grad = None
        return [g if g is None else g.detach().to_dense() if g.is_sparse else g.detach() for g in found]

    def mean(self, value: Tensor) -> float:
        """Return a scalar averaged over the ranks."""
        return self._mean(value.detach().clone()).item()

    def _mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value.div_(self.world), group=self.group)
        return value


_PLAIN = (Tensor, int, float, str, tuple, type(None))


def _values(names: dict[str, Any]) -> dict[str, Any]:
    """The tensors and plain values among the attributes of a module, or among its buffers, but the training flag."""
    return {name: value for name, value in names.items() if isinstance(value, _PLAIN) and name != "training"}


def _refill(names: dict[str, Any], values: dict[str, Any]) -> None:
    """Let names stand for these values, and no other names for tensors and plain values."""
    for name in _values(names).keys() - values.keys():
        del names[name]
    names.update(values)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors, accumulated in float64; complex numbers are pairs of real ones."""
    pairs = zip(map(_as_real, a), map(_as_real, b), strict=True)
    terms = [torch.sum(x * y, dtype=torch.float64) for x, y in pairs]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum().item() if terms else 0.0


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def norm(a: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of a list of tensors."""
    return dot(a, a) ** 0.5
