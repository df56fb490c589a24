"""The base of SGD-G and Adam-G (arXiv 1709.09603): groups of weights on the unit sphere beside ordinary groups."""

# pyright: reportPrivateImportUsage=false
# (torch's optimizers are written with the same _foreach functions)

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from normkit.methods.kernels.choice import kernels
from normkit.methods.riemannian import c_kernel
from normkit.methods.riemannian.filters import (
    Filters,
    arranged,
    clip_rows,
    local,
    memory_order,
    orthogonality_gradient,
    rows,
    wide,
)
from normkit.methods.riemannian.foreach import advance
from normkit.methods.riemannian.sphere import norm, project
from normkit.moments import statistics_dtype
from normkit.optim.effect import Effect, count
from normkit.optim.invariance import scale_invariance, weight_users

Rate: TypeAlias = float | Tensor


class SphereOptimizer(Optimizer):
    """Base of the two optimizers: checks groups, puts weights on the sphere, keeps state, walks over weights."""

    tau = "momentum_buffer"
    """Name of the momentum in the state."""

    _normalize_added = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._normalize_added = False  # all groups are checked before the first weight is touched
        super().__init__(params, defaults)
        del self._normalize_added
        for group in self.param_groups:
            normalize_group(group)
        if not any(group["manifold"] for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__}: no group has manifold=True, so no weight is on the sphere; build the groups "
                "with normkit.param_groups(model, lr=..., manifold_lr=...), or set manifold=True on a group yourself (where "
                "param_groups finds none, normkit.scale_invariance(model) says why)",
                stacklevel=3,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the filters of a manifold group are brought to length 1, in place.

        Args:
            param_group: ``params`` and any of the options of the class.

        Raises:
            ValueError: An option is out of range, or a weight of a manifold group has no filters to put on the sphere.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], f"{type(self).__name__}, group {len(self.param_groups) - 1}")
        except ValueError:
            self.param_groups.pop()
            raise
        if self._normalize_added:
            normalize_group(self.param_groups[-1])

    def effects(self, model: nn.Module) -> list[Effect]:
        """Return which weights of ``model`` are on the sphere, see [`normkit.describe`][].

        Args:
            model: The model.
        """
        on_sphere = {id(p) for group in self.param_groups if group["manifold"] for p in group["params"]}
        weights = {name: p for name in weight_users(model) if (p := model.get_parameter(name)).requires_grad}
        done = {name: p for name, p in weights.items() if id(p) in on_sphere}
        report = scale_invariance(model) if len(done) < len(weights) else {}
        left = {name: report[name].reason for name in weights if name not in done}
        return [Effect("on the sphere", "weights", tuple(done), left, (count(done.values()), count(weights.values())))]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step for all groups.

        Args:
            closure: Evaluates the model again and gives the loss.

        Returns:
            What the closure gave, or None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                shapes = ", ".join(str(tuple(p.shape)) for p in params if p.grad.is_sparse)
                raise RuntimeError(
                    f"{type(self).__name__}: the gradients of the weights of shape {shapes} are sparse, and momentum is dense; "
                    "build the embedding with sparse=False, or give its weight to another optimizer"
                )
            if not group["manifold"]:
                self._step_euclidean(group, params)
            elif group["foreach"]:
                weights = [filters for p in params if (filters := self._filters(group, p)).y.numel() > 0]
                step = self._kernel(group, weights) or advance
                step(weights, max_norm=group["max_norm"], **self._numbers(group))
                if step is not advance:
                    torch.autograd.graph.increment_version([t for filters in weights for t in (filters.y, filters.tau)])
            else:
                for p in params:
                    self._step_readable(group, self._filters(group, p))
        return loss

    def _kernel(self, group: dict[str, Any], weights: list[Filters]) -> Callable[..., None] | None:
        """The kernel's step where a kernel can do the group's, else None.

        Raises:
            RuntimeError: ``fused=True`` was asked for and is not possible.
        """
        if group["fused"] is False or not weights or torch.compiler.is_compiling():
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # a kernel is told addresses, which a graph would keep
        numbers = not any(torch.is_tensor(x) for x in (group["lr"], *(filters.correction for filters in weights)))
        kind = kernels(*(filters.y for filters in weights)) if numbers else None
        if kind == "c" and c_kernel.steps(weights):
            return c_kernel.advance
        if kind == "triton" and all(filters.in_place and filters.y.dtype == torch.float32 for filters in weights):
            from normkit.methods.riemannian.triton_kernel import FusedRows

            return vars(self).setdefault("_kernels", {}).setdefault(id(group), FusedRows()).advance
        if group["fused"]:
            raise RuntimeError(
                f"{type(self).__name__}: fused=True needs a kernel (Triton on a GPU, a C compiler on a CPU), contiguous float32 "
                "weights, a learning rate that is a number (capturable=False); leave fused at None to use it where it is possible"
            )
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; float32 state beside half-precision weights stays float32.

        Args:
            state_dict: What ``state_dict`` gave.

        Raises:
            ValueError: It is another optimizer's.
        """
        for number, group in enumerate(state_dict["param_groups"]):
            if (
                missing := self.defaults.keys() - group.keys() - {"differentiable"}
            ):  # torch adds it to a loaded optimizer
                raise ValueError(
                    f"{type(self).__name__}: group {number} of the state has no {', '.join(sorted(missing))}, so it is that of "
                    "another optimizer, whose momentum means something else; start without it"
                )
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            # torch casts what it loads to the weight's dtype
            for name, value in state_dict["state"].get(index, {}).items():
                if torch.is_tensor(value) and value.ndim > 0 and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(device=p.device, copy=True)

    def _step_readable(self, group: dict[str, Any], filters: Filters) -> None:
        """The paper's step for one weight, as it is written."""
        y = wide(rows(filters.y))
        y = y / norm(y)  # rounding, or weights loaded since, may have left the sphere
        h = clip_rows(project(y, wide(rows(filters.gradient()))), group["max_norm"])
        y, tau, v = self._move(group, filters, y, h)
        filters.y.copy_(y.view(filters.y.shape))
        filters.tau.copy_(tau.view(filters.tau.shape))
        if filters.v is not None and v is not None:
            filters.v.copy_(v)

    def _filters(self, group: dict[str, Any], p: Tensor) -> Filters:
        state = self.state[p]
        if not state:
            self._start(group, p, state)
        order = memory_order(local(p))
        tau = arranged(state[self.tau], order)
        v = local(state["exp_avg_sq"]).flatten(1) if "exp_avg_sq" in state else None

        def gradient() -> Tensor:
            return self._gradient(group, p, order)

        if hasattr(p, "full_tensor"):  # its collectives must come in the same order on all ranks: now
            found = gradient()
            gradient = lambda: found  # ruff: ignore[lambda-assignment]
        return Filters(arranged(p, order), gradient, tau, v, self._correction(group, state))

    def _gradient(self, group: dict[str, Any], p: Tensor, order: tuple[int, ...] | None) -> Tensor:
        """The gradient of loss and penalty."""
        assert p.grad is not None
        g = arranged(p.grad, order)
        alpha = group["orthogonality"]
        if alpha == 0 or p.shape[0] >= math.prod(p.shape[1:]):
            return g
        y = wide(rows(arranged(p, order)))
        y = y / norm(y)
        others = None
        if hasattr(p, "full_tensor"):
            others = wide(rows(arranged(p.full_tensor(), order)))  # pyright: ignore[reportAttributeAccessIssue]
            others = others / norm(others)
        return orthogonality_gradient(y, alpha, others).view(g.shape).add_(g)

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        """State of a weight on the sphere."""
        state[self.tau] = torch.zeros_like(p, dtype=statistics_dtype(p.dtype), memory_format=torch.preserve_format)

    def _correction(self, group: dict[str, Any], state: dict[str, Any]) -> Rate:
        """Bias correction of the learning rate at this step."""
        return 1.0

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        """What the fused kernel must know of the rule."""
        raise NotImplementedError

    def _move(
        self, group: dict[str, Any], filters: Filters, y: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rule for unit rows: new ``y``, ``tau`` and ``v``."""
        raise NotImplementedError

    def _step_euclidean(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """SGD with Nesterov momentum, its decay coupled (part of the gradient) or decoupled; the gradients are only read."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        grads = [local(p.grad) for p in params if p.grad is not None]
        params = [local(p) for p in params]
        decoupled = group["decoupled_weight_decay"]
        if decoupled and group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        # torch's foreach kernel writes to the gradients; its fused one does not, but wants contiguous memory and real numbers,
        # and two of it in one compiled graph mix up their parameters
        fused = not torch.compiler.is_compiling() and all(
            x.is_contiguous() and not x.is_complex() for x in (*params, *grads, *buffers)
        )
        sgd(
            params,
            grads if fused else [g.clone() for g in grads],
            list(buffers),
            fused=fused,
            foreach=not fused,
            weight_decay=0.0 if decoupled else group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=True,
            maximize=False,
        )


def check_group(group: dict[str, Any], where: str) -> None:
    """Check a group before anything is changed.

    Args:
        group: The group, defaults filled in.
        where: What to call it.

    Raises:
        ValueError: An option is out of range, or a weight of a manifold group has no filters to put on the sphere.
    """
    for option, low, high in (
        ("lr", 0, math.inf),
        ("momentum", 0, 1),
        ("max_norm", 0, math.inf),
        ("orthogonality", 0, math.inf),
        ("weight_decay", 0, math.inf),
        ("eps", 0, math.inf),
    ):
        if not low <= group.get(option, low) <= high:
            raise ValueError(f"{where}: {option}={group[option]} must be between {low} and {high}")
    if group["max_norm"] == 0:
        raise ValueError(f"{where}: max_norm=0 would stop all filters; use math.inf for no bound")
    if not all(0 <= beta < 1 for beta in group.get("betas", ())):
        raise ValueError(f"{where}: betas={group['betas']} must be at least 0 and below 1")
    for index, p in enumerate(group["params"] if group["manifold"] else ()):
        what = f"{where}, parameter {group['param_names'][index] if 'param_names' in group else index}"
        if p.ndim < 2 or not p.is_floating_point():
            raise ValueError(
                f"{what}: shape {tuple(p.shape)}, {p.dtype} has no real filters to put on the sphere; put it in a "
                "group with manifold=False (FSDP version 1 flattens weights: use fully_shard, which keeps filters)"
            )
        if any(getattr(placement, "dim", 0) != 0 for placement in getattr(p, "placements", ())):
            raise ValueError(
                f"{what}: placements {p.placements} cut through filters; shard dimension 0, or manifold=False"
            )
        lengths = torch.linalg.vector_norm(
            local(p.detach()), dim=tuple(range(1, p.ndim)), dtype=statistics_dtype(p.dtype)
        )
        bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{what}: filter {bad[0]} ({len(bad)} in all) has length {lengths[bad[0]].item()} and so no direction; "
                "initialise it, or put the weight in a group with manifold=False"
            )


@torch.no_grad()
def normalize_group(group: dict[str, Any]) -> None:
    """Bring the filters of a manifold group to length 1."""
    for p in group["params"] if group["manifold"] else ():
        y = wide(local(p))
        local(p).copy_(y / torch.linalg.vector_norm(y, dim=tuple(range(1, p.ndim)), keepdim=True))
