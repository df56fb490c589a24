"""SGD-G and Adam-G: gradient descent for weights whose scale does not matter, on the manifold of their directions.

Riemannian approach to batch normalization, Minhyung Cho and Jaehyung Lee, NIPS 2017, arXiv 1709.09603.

A filter ``y`` (a row of the weight, seen as ``(C_out, fan-in)``) stays on the unit sphere. Its gradient is
projected and clipped, and it moves along a geodesic; the momentum ``tau`` moves with it. Not to be confused with the
AdamG of arXiv 2405.04376, another method.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.methods.method import Method, Part, Recipe, Request
from normkit.methods.riemannian.base import Rate, SphereOptimizer
from normkit.methods.riemannian.filters import Filters, rows
from normkit.methods.riemannian.sphere import dot, exponential_map, parallel_transport
from normkit.optim.invariance import Rule
from normkit.optim.param_groups import param_groups


def sgdg(y: Tensor, h: Tensor, tau: Tensor, *, lr: Rate, momentum: float) -> tuple[Tensor, Tensor]:
    """Compute one step of SGD-G: ``d = momentum tau - lr h``, ``y <- exp_y(d)``, ``tau <- pt_y(d; d)``.

    ``SGDG`` calls it with ``foreach=False``; by default the same step is computed for all filters together, which a test holds
    to this function over 100 steps.

    Args:
        y: Filters, unit rows of shape ``(C_out, n)``.
        h: Their projected and clipped gradients, shape ``(C_out, n)``.
        tau: Momentum, tangent at ``y``, shape ``(C_out, n)``; the learning rate is inside it.
        lr: Learning rate, in radians per unit of gradient.
        momentum: Share of ``tau`` that is kept.

    Returns:
        The new filters and momentum.

    Examples:
        >>> y, h, tau = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -1.0]]), torch.zeros(1, 2)
        >>> sgdg(y, h, tau, lr=torch.pi / 2, momentum=0.9)[0].round(decimals=6).tolist()
        [[-0.0, 1.0]]
    """
    d = momentum * tau - lr * h
    return exponential_map(y, d), parallel_transport(y, d, d)


def adamg(
    y: Tensor, h: Tensor, tau: Tensor, v: Tensor, *, rate: Rate, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one step of Adam-G, with one second moment per filter.

    ``m = b1 tau + (1 - b1) h``, ``v <- b2 v + (1 - b2) h.h``, ``d = -rate m / sqrt(v + eps)``, ``y <- exp_y(d)``,
    ``tau <- pt_y(m; d)``. ``AdamG`` calls it with ``foreach=False``; by default the same step is computed for all filters
    together, which a test holds to this function over 100 steps.

    Args:
        y: Filters, unit rows of shape ``(C_out, n)``.
        h: Their projected and clipped gradients, shape ``(C_out, n)``.
        tau: First moment, tangent at ``y``, shape ``(C_out, n)``.
        v: Second moment, shape ``(C_out, 1)``.
        rate: Learning rate with its bias corrections, ``lr sqrt(1 - b2^t) / (1 - b1^t)``.
        betas: Decay of the first and of the second moment.
        eps: Added to ``v`` inside the root.

    Returns:
        The new filters, first and second moment.

    Examples:
        >>> y, h, tau, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -0.1]]), torch.zeros(1, 2), torch.zeros(1, 1)
        >>> adamg(y, h, tau, v, rate=torch.pi / 2, betas=(0.0, 0.0), eps=0.0)[0].round(decimals=6).tolist()
        [[-0.0, 1.0]]
    """
    m = betas[0] * tau + (1 - betas[0]) * h
    v = betas[1] * v + (1 - betas[1]) * dot(h, h)
    d = -rate * m * torch.rsqrt(v + eps)
    return exponential_map(y, d), parallel_transport(y, d, m), v


class SGDG(SphereOptimizer):
    """SGD-G (arXiv 1709.09603) for the filters of manifold groups, SGD with Nesterov momentum for all other groups.

    Manifold groups, per filter ``y``, with the projected and clipped gradient ``h``: ``d = momentum tau - lr h``,
    ``y <- exp_y(d)``, ``tau <- pt_y(d; d)``. Their weights are brought to unit rows when the group is added;
    [`normkit.param_groups`][] makes groups for which that leaves the network's function as it was.

    Args:
        params: Groups (see [`normkit.param_groups`][]); every option below can be set per group.
        lr: Learning rate of groups that bring none.
        momentum: Momentum of both kinds of group.
        manifold: Whether the group's weights live on the sphere, one row per filter (``weight.flatten(1)``).
        max_norm: Bound on the length of each filter's projected gradient; ``math.inf`` for none.
        orthogonality: Strength ``alpha`` of the penalty ``(alpha / 2) |W W^T - I|_F^2`` on weights with fewer filters
            than fan-in, added to the loss (its gradient is projected and clipped, too); 0 for none. It costs two matrix
            products per weight.
        weight_decay: Weight decay of groups that are not on the manifold; a direction has nothing to decay.
        decoupled_weight_decay: Whether those weights shrink by ``lr * weight_decay`` per step, outside the momentum. By
            default the decay is a part of the gradient, as in the authors' code: about ``1 / (1 - momentum)`` times stronger.
        foreach: Few calls for many filters (default), or the readable loop over weights.
        fused: One kernel for all filters, in C on a CPU, in Triton on a GPU. Default: where it is possible.

    Raises:
        ValueError: An option is out of range, or a weight of a manifold group has no filters to put on the sphere.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> optimizer = SGDG([{"params": [weight], "manifold": True}], lr=0.2)
        >>> weight.tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Rate = 0.2,
        momentum: float = 0.9,
        *,
        manifold: bool = False,
        max_norm: float = 0.1,
        orthogonality: float = 0.1,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        foreach: bool = True,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "manifold": manifold,
            "max_norm": max_norm,
            "orthogonality": orthogonality,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        return {"lr": group["lr"], "momentum": group["momentum"]}

    def _move(self, group: dict[str, Any], filters: Filters, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, None]:
        return *sgdg(y, h, rows(filters.tau), lr=group["lr"], momentum=group["momentum"]), None


class AdamG(SphereOptimizer):
    """Adam-G (arXiv 1709.09603) for the filters of manifold groups, SGD with Nesterov momentum for all others.

    Manifold groups, per filter ``y``, with the projected and clipped gradient ``h``: ``m = b1 tau + (1 - b1) h``,
    ``v <- b2 v + (1 - b2) h.h`` (one number per filter), ``d = -lr sqrt(1 - b2^t) / (1 - b1^t) m / sqrt(v + eps)``,
    ``y <- exp_y(d)``, ``tau <- pt_y(m; d)``.

    Args:
        params: Groups (see [`normkit.param_groups`][]); every option below can be set per group.
        lr: Learning rate of groups that bring none; on the manifold about the angle of a step, in radians.
        betas: Decay of the first and of the second moment.
        eps: Added inside the root.
        momentum: Momentum of the other groups.
        manifold: Whether the group's weights live on the sphere, one row per filter (``weight.flatten(1)``).
        max_norm: Bound on the length of each filter's projected gradient; ``math.inf`` for none.
        orthogonality: Strength ``alpha`` of the penalty ``(alpha / 2) |W W^T - I|_F^2`` on weights with fewer filters
            than fan-in, added to the loss (its gradient is projected and clipped, too); 0 for none. It costs two matrix
            products per weight.
        weight_decay: Weight decay of groups that are not on the manifold; a direction has nothing to decay.
        decoupled_weight_decay: Whether those weights shrink by ``lr * weight_decay`` per step, outside the momentum. By
            default the decay is a part of the gradient, as in the authors' code: about ``1 / (1 - momentum)`` times stronger.
        foreach: Few calls for many filters (default), or the readable loop over weights.
        fused: One kernel for all filters, in C on a CPU, in Triton on a GPU. Default: where it is possible.
        capturable: Count steps on the weights' device, so that a step can be captured in a CUDA graph.

    Raises:
        ValueError: An option is out of range, or a weight of a manifold group has no filters to put on the sphere.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamG([{"params": [weight], "manifold": True}], lr=0.05)
        >>> (weight * torch.tensor([1.0, -1.0])).sum().backward()
        >>> optimizer.step()  # the first step is lr long, whatever the gradient
        >>> round(float(torch.acos(weight.detach()[0] @ torch.tensor([0.6, 0.8]))), 3)
        0.05
    """

    tau = "exp_avg"

    def __init__(
        self,
        params: Iterable[Any],
        lr: Rate = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        momentum: float = 0.9,
        *,
        manifold: bool = False,
        max_norm: float = 0.1,
        orthogonality: float = 0.1,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        foreach: bool = True,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "manifold": manifold,
            "max_norm": max_norm,
            "orthogonality": orthogonality,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        super()._start(group, p, state)
        state["exp_avg_sq"] = torch.zeros_like(state[self.tau].detach()[(slice(None), *(slice(1),) * (p.ndim - 1))])
        state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")

    def _correction(self, group: dict[str, Any], state: dict[str, Any]) -> Rate:
        state["step"] += 1
        step = state["step"] if group["capturable"] or torch.compiler.is_compiling() else state["step"].item()
        beta1, beta2 = group["betas"]
        return (1 - beta2**step) ** 0.5 / (1 - beta1**step)

    def _numbers(self, group: dict[str, Any]) -> dict[str, float]:
        return {"lr": group["lr"], "momentum": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}

    def _move(self, group: dict[str, Any], filters: Filters, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert filters.v is not None
        rate = group["lr"] * filters.correction
        return adamg(y, h, rows(filters.tau), filters.v, rate=rate, betas=group["betas"], eps=group["eps"])


def on_sphere(
    request: Request,
    model: nn.Module,
    *,
    optimizer: type[SGDG] | type[AdamG],
    divisor: float,
    rule: Rule = "exact",
    **options: Any,
) -> Optimizer:
    """Build the optimizer over typed groups: the request's rate on the sphere, a proportion of it elsewhere.

    Args:
        request: What the user asked for.
        model: The model; its scale-invariant filters are brought to length 1.
        optimizer: Which one.
        divisor: The other weights learn at ``lr / divisor``.
        rule: Which weights go on the sphere, see ``normkit.scale_invariance``.
        **options: Further arguments of the optimizer.
    """
    groups = param_groups(
        model, lr=request.lr / divisor, weight_decay=request.weight_decay, manifold_lr=request.lr, rule=rule
    )
    return optimizer(groups, momentum=request.momentum, **options)


_PAPER = "Cho, Lee 2017, arXiv 1709.09603"
_GROUP = "Filters on the unit sphere"
_SGDG = ("max_norm", "orthogonality", "decoupled_weight_decay")
_ADAMG = (*_SGDG, "betas", "eps")

METHOD = Method(
    recipes=(
        Recipe(
            "sgd-g",
            "SGD; scale-invariant filters on the unit sphere",
            _PAPER,
            0.2,
            optimizer=Part(on_sphere, *_SGDG, optimizer=SGDG, divisor=20),
            group=_GROUP,
            revision=2,
        ),
        Recipe(
            "adam-g",
            "Adam; scale-invariant filters on the unit sphere",
            _PAPER,
            0.05,
            optimizer=Part(on_sphere, *_ADAMG, optimizer=AdamG, divisor=5),
            group=_GROUP,
            ablation=True,
            revision=2,
        ),
        Recipe(
            "sgd-g-paper",
            "SGD-G by the paper's rule: nearly every convolution",
            _PAPER,
            0.2,
            optimizer=Part(on_sphere, *_SGDG, optimizer=SGDG, divisor=20, rule="paper"),
            group=_GROUP,
            revision=2,
            ablation=True,
        ),
        Recipe(
            "adam-g-paper",
            "Adam-G by the paper's rule: nearly every convolution",
            _PAPER,
            0.05,
            optimizer=Part(on_sphere, *_ADAMG, optimizer=AdamG, divisor=5, rule="paper"),
            group=_GROUP,
            revision=2,
            ablation=True,
        ),
    )
)
