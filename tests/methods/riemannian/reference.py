"""SGD-G and Adam-G filter by filter in float64, written from the paper's equations, slowly."""

import math

import torch


def reference_gradient(y, g, *, alpha, nu):
    """Projected, clipped gradient of one weight, with y and g of shape (C_out, n)."""
    rows, n = y.shape
    penalty = torch.zeros_like(y)
    if alpha > 0 and rows < n:
        columns = y.T  # the paper's Y, one filter per column
        penalty = (2 * alpha * columns @ (columns.T @ columns - torch.eye(rows, dtype=y.dtype))).T
    h = torch.empty_like(y)
    for i in range(rows):
        g_i = g[i] + penalty[i]
        tangent = g_i - torch.dot(y[i], g_i) * y[i]
        length = float(tangent.norm())
        h[i] = tangent * (min(1.0, nu / length) if length > 0 else 1.0)
    return h


def exp_and_transport(y, d, carried):
    t = float(d.norm())
    if t == 0:
        return y.clone(), carried.clone()
    u = d / t
    z = y * math.cos(t) + u * math.sin(t)
    return z, carried - torch.dot(u, carried) * ((1 - math.cos(t)) * u + math.sin(t) * y)


class Reference:
    """One weight on the sphere; ``rule`` is "sgdg" or "adamg"."""

    def __init__(self, rule, weight, *, lr, alpha=0.1, nu=0.1, momentum=0.9, betas=(0.9, 0.99)):
        self.rule, self.lr, self.momentum, self.betas, self.eps = rule, lr, momentum, betas, 1e-8
        self.options = {"alpha": alpha, "nu": nu}
        self.shape = weight.shape
        rows = weight.detach().double().flatten(1)
        self.y = rows / rows.norm(dim=1, keepdim=True)
        self.tau = torch.zeros_like(self.y)
        self.v = [0.0] * len(rows)
        self.t = 0

    def step(self, gradient):
        h = reference_gradient(self.y, gradient.double().flatten(1), **self.options)
        y, tau = self.y.clone(), self.tau.clone()
        self.t += 1
        b1, b2 = self.betas
        for i in range(len(y)):
            if self.rule == "sgdg":
                d = self.momentum * self.tau[i] - self.lr * h[i]
                y[i], tau[i] = exp_and_transport(self.y[i], d, d)
            else:
                m = b1 * self.tau[i] + (1 - b1) * h[i]
                self.v[i] = b2 * self.v[i] + (1 - b2) * float(h[i] @ h[i])
                d = -self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t) * m / math.sqrt(self.v[i] + self.eps)
                y[i], tau[i] = exp_and_transport(self.y[i], d, m)
        self.y, self.tau = y, tau

    @property
    def weight(self):
        return self.y.view(self.shape)
