"""Geometry of the unit sphere for rows: projection, exponential map, logarithmic map, parallel transport.

A filter that feeds a normalization matters only through its direction, so it lives on the Grassmann manifold G(1, n),
whose operators at a point of unit length are those of the sphere. Riemannian approach to batch normalization, Minhyung
Cho and Jaehyung Lee, NIPS 2017, arXiv 1709.09603.

Every function works on the last dimension, a *row*, and broadcasts over the others. With ``t = |h|`` and the entire
functions ``sinc t = sin t / t`` and ``(1 - cos t) / t^2 = sinc^2(t / 2) / 2`` nothing is divided by a length: a zero or
subnormal step gives no NaN in any dtype. Rows in float16 and bfloat16 are computed in float32 and returned in their own
dtype.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from normkit.moments import statistics_dtype


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute half-precision rows in float32."""

    @wraps(function)
    def wide(*rows: Tensor) -> Tensor:
        dtype = torch.result_type(rows[0], rows[-1])
        return function(*(row.to(statistics_dtype(row.dtype)) for row in rows)).to(dtype)

    return wide


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner product of rows, the last dimension kept: shape ``(..., 1)``."""
    return (x * y).sum(-1, keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean length of rows, the last dimension kept: shape ``(..., 1)``."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def sinc(t: Tensor) -> Tensor:
    """Return ``sin(t) / t``, 1 at zero."""
    return torch.sinc(t / math.pi)


@_widened
def project(y: Tensor, g: Tensor) -> Tensor:
    """Return the part of ``g`` that is tangent to the sphere at ``y``: ``g - (y.g) y``.

    Args:
        y: Points, rows of unit length, shape ``(..., n)``.
        g: Any vectors, for instance gradients, shape ``(..., n)``.

    Returns:
        Tangent vectors, shape ``(..., n)``.

    Examples:
        >>> project(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])).tolist()
        [0.0, 4.0]
    """
    return g - dot(y, g) * y


@_widened
def exponential_map(y: Tensor, h: Tensor) -> Tensor:
    """Follow the geodesic from ``y`` in direction ``h`` for the length ``t = |h|``: ``y cos t + h sinc t``.

    Args:
        y: Points, rows of unit length, shape ``(..., n)``.
        h: Tangent vectors at ``y``, shape ``(..., n)``.

    Returns:
        Points, shape ``(..., n)``.

    Examples:
        >>> exponential_map(torch.tensor([1.0, 0.0]), torch.tensor([0.0, torch.pi / 6])).round(decimals=6).tolist()
        [0.8660249710083008, 0.5]
    """
    t = norm(h)
    return y * t.cos() + h * sinc(t)


@_widened
def logarithmic_map(y: Tensor, z: Tensor) -> Tensor:
    """Return the tangent vector at ``y`` whose geodesic arrives at ``z``.

    It undoes [`normkit.functional.exponential_map`][] for lengths below pi.

    The optimizers do not need it; ``norm(logarithmic_map(y, z))`` is the angle between two filters.

    With ``v = z - (y.z) y`` and ``theta = atan2(|v|, y.z)`` it is ``theta v / |v| = v / sinc(theta)``, zero at
    ``z = y``. At ``z = -y`` every direction is shortest; the result is then finite and its direction is rounding's.

    Args:
        y: Points, rows of unit length, shape ``(..., n)``.
        z: Points, rows of unit length, shape ``(..., n)``.

    Returns:
        Tangent vectors at ``y``, shape ``(..., n)``, of length at most pi.

    Examples:
        >>> logarithmic_map(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).tolist()
        [0.0, 1.5707963705062866]
    """
    cosine = dot(y, z)
    v = z - cosine * y
    theta = torch.atan2(norm(v), cosine)
    return v / sinc(theta).clamp(min=torch.finfo(v.dtype).eps)


@_widened
def parallel_transport(y: Tensor, h: Tensor, vector: Tensor) -> Tensor:
    """Carry a tangent ``vector`` from ``y`` to ``exponential_map(y, h)`` along the geodesic.

    With ``u = h/t``: ``vector - (u.vector) [(1 - cos t) u + sin t y]``, that is
    ``vector - (h.vector) [h sinc^2(t/2) / 2 + y sinc t]``. Lengths and angles are kept.

    Args:
        y: Points, rows of unit length, shape ``(..., n)``.
        h: Tangent vectors at ``y``, the way to go, shape ``(..., n)``.
        vector: Tangent vectors at ``y``, what is carried, shape ``(..., n)``.

    Returns:
        Tangent vectors at the point of arrival, shape ``(..., n)``.

    Examples:
        >>> y, h = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, torch.pi / 2, 0.0])
        >>> parallel_transport(y, h, torch.tensor([0.0, 0.0, 2.0])).tolist()
        [0.0, 0.0, 2.0]
    """
    t = norm(h)
    return vector - dot(h, vector) * (h * (sinc(t / 2).square() / 2) + y * sinc(t))
