"""What preconditioning does to the Hessian: condition numbers of real layers, and predicted against observed rates.

1. A CNN is trained on the embedded digits for a moment. For each layer: the second moment of its rows, ``E[h^ h^T]`` with
   ``h^ = (1, h)``, which is the Hessian of one unit for the squared loss; for the classifier also the exact Hessian of the cross
   entropy. Their condition numbers over the non-zero eigenvalues, before and after ``P^T H P``.
2. A batch-normalized least-squares unit is scale-invariant: its loss is flat along its own weights, so it is convex near the
   minimum but not strongly. With ``kappa`` over the non-zero eigenvalues, gradient descent with step ``2 / (l_max + l_min)``
   should shrink its error by ``(kappa - 1) / (kappa + 1)`` per step. Observed: the late decay of the loss.

    python benchmarks/bnp_conditioning.py [--quick] [--save NAME]
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from common import save
from normkit.study.data.load import load_data
from normkit.study.models import build_model


def preconditioner(h: Tensor) -> Tensor:
    """``P = U D`` of rows ``h``, over ``(b, w)``; features that never vary are left as they are."""
    p = torch.eye(h.shape[1] + 1, dtype=h.dtype)
    p[0, 1:] = -h.mean(0)
    scale = h.std(0, correction=0)
    p[:, 1:] /= torch.where(scale > 1e-8, scale, 1)
    return p


def condition(hessian: Tensor) -> float:
    """Largest over smallest non-zero eigenvalue."""
    values = torch.linalg.eigvalsh(hessian)
    values = values[values > values[-1] * len(values) * 1e-14]
    return (values[-1] / values[0]).item()


def both(hessian: Tensor, p: Tensor) -> dict[str, float]:
    """Condition numbers before and after preconditioning."""
    return {"before": condition(hessian), "after": condition(p.T @ hessian @ p)}


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows a layer multiplies its weight with: windows of a convolution, samples of a linear layer."""
    if isinstance(layer, nn.Conv2d):
        windows = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        x = windows.transpose(1, 2).reshape(-1, windows.shape[1])
    return x.double()


def real_layers(steps: int) -> dict[str, dict[str, float]]:
    """Condition numbers for the layers of a digits CNN without normalization, after some training."""
    data = load_data("digits")
    torch.manual_seed(0)
    model = build_model("digits-cnn", input_shape=data.input_shape, classes=data.classes)
    model, optimizer = normkit.apply("none", model, lr=0.03)
    for _ in range(steps):
        chosen = torch.randint(len(data.train.labels), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(data.normalise(data.train.inputs[chosen])), data.train.labels[chosen]).backward()
        optimizer.step()
    taken: dict[str, Tensor] = {}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, args, path=path: taken.update({path: rows_of(m, args[0])}))
    with torch.no_grad():
        logits = model(data.normalise(data.train.inputs[:500]))
    result = {}
    for path, h in taken.items():
        ones = torch.cat([h.new_ones(len(h), 1), h], 1)
        # one unit, squared loss; a convolution's preconditioner shares mean and variance among its taps
        p = preconditioner(h) if isinstance(layers[path], nn.Linear) else _shared(h, layers[path].in_channels)
        result[f"{path} {type(layers[path]).__name__}, rows"] = both(ones.T @ ones / len(h), p)
    softmax = torch.softmax(logits.double(), 1)
    curvature = torch.diag_embed(softmax) - softmax[:, :, None] * softmax[:, None]
    hessian = torch.einsum("nij,na,nb->iajb", curvature, ones, ones) / len(ones)
    size = curvature.shape[1] * ones.shape[1]
    p = torch.block_diag(*[p] * curvature.shape[1])
    result["classifier, cross entropy"] = both(hessian.reshape(size, size), p)
    return result


def _shared(h: Tensor, channels: int) -> Tensor:
    """The preconditioner of a convolution: one mean and variance per channel."""
    per_channel = h.reshape(len(h), channels, -1).transpose(1, 2).reshape(-1, channels)
    small, taps = preconditioner(per_channel), h.shape[1] // channels
    p = torch.eye(h.shape[1] + 1, dtype=h.dtype)
    p[0, 1:] = small[0, 1:].repeat_interleave(taps)
    p[1:, 1:] = torch.diag(small.diagonal()[1:].repeat_interleave(taps))
    return p


def scale_invariant(steps: int) -> dict[str, dict[str, float]]:
    """Predicted and observed rate on a batch-normalized least-squares unit, without and with preconditioning."""
    data = load_data("digits")
    images = F.avg_pool2d(data.train.inputs.double().reshape(-1, 1, 8, 8), 2).flatten(1)
    h = images[:, images.std(0) > 0]
    target = (data.train.labels >= 5).double()
    target = (target - target.mean()) / target.std(correction=0)
    centred = h - h.mean(0)
    best = torch.linalg.lstsq(centred, target[:, None]).solution[:, 0]
    best = best / (centred @ best).std(correction=0)  # scale does not matter: spread 1

    def loss(w: Tensor) -> Tensor:
        a = centred @ w
        return (a / a.square().mean().sqrt() - target).square().mean()

    result = {}
    for name, scale in {"plain": torch.ones(len(best), dtype=h.dtype), "preconditioned": centred.std(0)}.items():
        result[name] = _rates(lambda z, scale=scale: loss(z / scale), best * scale, steps)
    return result


def _rates(loss: Callable[[Tensor], Tensor], minimum: Tensor, steps: int) -> dict[str, float]:
    hessian = torch.autograd.functional.hessian(loss, minimum)
    values = torch.linalg.eigvalsh(hessian)
    values = values[values > 1e-9 * values[-1]]
    kappa = (values[-1] / values[0]).item()
    z = (
        minimum + 1e-3 * torch.randn(len(minimum), dtype=minimum.dtype, generator=torch.manual_seed(0))
    ).requires_grad_()
    floor, rate, excess = loss(minimum).item(), 2 / (values[-1] + values[0]), []
    for _ in range(steps):
        (slope,) = torch.autograd.grad(value := loss(z), z)
        excess.append(value.item() - floor)
        z = (z - rate * slope).detach().requires_grad_()
    usable = [e for e in excess if e > 1e-13]
    late = len(usable) // 2
    observed = (usable[-1] / usable[late]) ** (0.5 / (len(usable) - 1 - late))
    return {"kappa": kappa, "predicted": (kappa - 1) / (kappa + 1), "observed": observed}


def main() -> None:
    """Compute, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = (10, 2000) if args.quick else (100, 20_000)
    layers, rates = real_layers(steps[0]), scale_invariant(steps[1])
    print(f"{'condition number of':<36}{'before':>12}{'after':>12}")
    for name, pair in layers.items():
        print(f"{name:<36}{pair['before']:12.3g}{pair['after']:12.3g}")
    print(f"\n{'scale-invariant unit':<20}{'kappa':>10}{'predicted rate':>16}{'observed rate':>16}")
    for name, row in rates.items():
        print(f"{name:<20}{row['kappa']:10.4g}{row['predicted']:16.6f}{row['observed']:16.6f}")
    result: dict[str, Any] = {"layers": layers, "rates": rates}
    if args.save:
        save(args.save, shlex.join(["python", *sys.argv]), result)


if __name__ == "__main__":
    main()
