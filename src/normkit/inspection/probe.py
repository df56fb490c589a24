"""Measure a model without disturbing it: the rules that every instrument follows.

A measurement works on private copies of parameters and buffers, so that the training it watches finds its own tensors,
bit for bit, also when the measurement fails; gradients, random states, train/eval flags and what the methods have
observed stay as they were.
"""

import random
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normkit.inspection.counting import no_counting

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

        self._pairs: list[tuple[Tensor, Tensor]] = []  # buffers: (original, copy)
        for module in self.model.modules():
            stack.callback(setattr, module, "training", module.training)
            stack.callback(_refill, module._buffers, dict(module._buffers))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copy(buffer)
                    self._pairs.append((buffer, module._buffers[name]))  # pyright: ignore[reportArgumentType]
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
        with torch.enable_grad():
            try:
                found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            except RuntimeError as error:
                if "heckpoint" not in str(error) or ".grad()" not in str(error):
                    raise
                loss = self.loss()  # reentrant activation checkpointing knows .backward() only
                loss.backward()
                found = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
                for parameter in self._weights:
                    parameter.grad = None
        return self.mean(loss), [self._mean(g.detach()) for g in found]

    def mean(self, value: Tensor) -> float:
        """Return a scalar averaged over the ranks."""
        return self._mean(value.detach().clone()).item()

    def _mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value.div_(self.world), group=self.group)
        return value


def _refill(target: dict[str, Any], content: dict[str, Any]) -> None:
    target.clear()
    target.update(content)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors, accumulated in float64."""
    terms = [torch.sum(x * y, dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum().item() if terms else 0.0


def norm(a: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of a list of tensors."""
    return dot(a, a) ** 0.5
