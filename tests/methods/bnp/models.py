"""Models, data and a slow reference for the tests of BNP."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from normkit import BNP


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3, bias=False),
    )


MODELS = {"mlp": (mlp, (6,)), "cnn": (cnn, (2, 8, 8))}


def train(model, data, step, optimizer, micro=None):
    for x, y in data:
        optimizer.zero_grad()
        for part, target in zip(x.split(micro or len(x)), y.split(micro or len(y)), strict=True):
            (F.cross_entropy(model(part), target) * len(part) / len(x)).backward()
        step()


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(a, b, tolerance=1e-12):
    return torch.allclose(parameters(a), parameters(b), rtol=tolerance, atol=tolerance)


def twin(model, **options):
    """A copy with its own BNP and SGD."""
    other = copy.deepcopy(model)
    optimizer = SGD(other.parameters(), lr=0.1, momentum=0.9)
    bnp = BNP(other, **options)
    bnp.attach(optimizer)
    return other, optimizer, bnp


def reference(model, data, lr=0.1, momentum=0.9, decay=0.99):
    """BNP + SGD written out slowly: rows by hand, one layer at a time."""
    model = copy.deepcopy(model)
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
    state, velocity = {}, {p: torch.zeros_like(p) for p in model.parameters()}
    for t, (x, y) in enumerate(data, 1):
        h, taken = x, {}
        for m in model:
            inputs, h = h, m(h.clone())
            if m in layers:
                taken[m] = (inputs.detach(), h.numel() / h.shape[1])
        model.zero_grad()
        F.cross_entropy(h, y).backward()
        for m in layers:
            rows, positions = taken[m]
            if isinstance(m, nn.Conv2d):
                patches = F.unfold(rows, m.kernel_size, padding=m.padding, stride=m.stride)
                rows = patches.unflatten(1, (rows.shape[1], -1))
            shrink = m.stride[0] * m.stride[1] if isinstance(m, nn.ConvTranspose2d) else 1  # its inserted zeros
            rows = rows.movedim(1, -1).reshape(-1, rows.shape[1])
            mean, second = rows.mean(0) / shrink, rows.square().mean(0) / shrink
            w = max(1 - decay, 1 / t)
            old_mean, old_var = state.get(m, (torch.zeros_like(mean), torch.ones_like(mean)))
            variance = (1 - w) * old_var + w * (second - mean**2) + w * (1 - w) * (mean - old_mean) ** 2
            mean = (1 - w) * old_mean + w * mean
            state[m] = mean, variance
            s = variance + 1e-2 * variance.max() + 1e-4
            transposed = isinstance(m, nn.ConvTranspose2d)
            groups = getattr(m, "groups", 1)
            weight = m.weight.grad
            outs = m.weight.shape[1] * groups if transposed else m.weight.shape[0]
            ins = len(mean)
            fan_in = m.weight.numel() / outs
            q2 = max(fan_in / positions, 1)
            full = weight.unsqueeze(-1).unsqueeze(-1) if weight.dim() == 2 else weight
            new = torch.zeros_like(full)
            new_bias = torch.zeros(outs, dtype=weight.dtype)
            for o in range(outs):
                group = o // (outs // groups)
                channels = range(group * ins // groups, (group + 1) * ins // groups)
                at = [(c, o % (outs // groups)) if transposed else (o, c - channels[0]) for c in channels]
                if m.bias is not None:
                    for c, index in zip(channels, at, strict=True):
                        new[index] = (full[index] - mean[c] * m.bias.grad[o]) / (q2 * s[c])
                    new_bias[o] = m.bias.grad[o] / q2 - sum(
                        mean[c] * new[index].sum() for c, index in zip(channels, at, strict=True)
                    )
                else:
                    metric = torch.diag(s) + torch.outer(mean, mean)
                    new[o, :, 0, 0] = torch.linalg.solve(metric, full[o, :, 0, 0]) / q2
            weight.copy_(new.reshape(weight.shape))
            if m.bias is not None:
                m.bias.grad.copy_(new_bias)
        with torch.no_grad():
            for p in model.parameters():
                velocity[p] = momentum * velocity[p] + p.grad
                p -= lr * velocity[p]
    return model
