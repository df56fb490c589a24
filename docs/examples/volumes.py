"""A hand-written training loop on 3-D volumes, one volume at a time: the method is one line of it.

python docs/examples/volumes.py                       # all methods below, one learning rate each
python docs/examples/volumes.py bnp 0.03

A small U-Net finds the bright ellipsoid in noisy volumes whose brightness and contrast differ. Two volumes make a step, their
gradients accumulated one by one, as one does when a step's volumes do not fit into memory together.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import normkit

# each the best of 0.01, 0.03 and 0.1
RATES = {"none": 0.1, "batch": 0.1, "group": 0.03, "bnp": 0.03}
STEPS, ACCUMULATE = 100, 2


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with its normalization."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv3d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net with one skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.pool, self.inner = block(1, 8), nn.MaxPool3d(2), block(8, 16)
        self.up, self.joined, self.head = nn.ConvTranspose3d(16, 8, 2, stride=2), block(16, 8), nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 1, D, H, W)`` of volumes of the same shape."""
        skip = self.outer(x)
        return self.head(self.joined(torch.cat([skip, self.up(self.inner(self.pool(skip)))], 1)))


def volumes(count: int, seed: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy volumes and the masks of their ellipsoids, ``(count, 1, side, side, side)`` each."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, size: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, size, 1, 1, 1, generator=generator)

    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side)] * 3, indexing="ij"))
    distance = ((grid - uniform(-0.4, 0.4, 3)) / uniform(0.4, 0.8, 3)).square().sum(1, keepdim=True)
    mask = (distance < 1).float()
    noise = torch.randn(mask.shape, generator=generator)
    return uniform(-0.5, 0.5) + uniform(0.7, 1.4) * (mask + 0.5 * noise), mask


def objective(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy and soft Dice, as usual where the foreground is small."""
    found = logits.sigmoid()
    overlap = (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
    return binary_cross_entropy_with_logits(logits, mask) + 1 - overlap


def train(method: str, lr: float) -> nn.Module:
    """The loop; nothing in it knows the method."""
    torch.manual_seed(0)
    inputs, masks = volumes(STEPS * ACCUMULATE, seed=1)

    model, optimizer = normkit.apply(method, UNet(), lr=lr, momentum=0.9, batches=inputs[:32].split(4))

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for i in range(step * ACCUMULATE, (step + 1) * ACCUMULATE):
            loss = objective(model(inputs[i : i + 1]), masks[i : i + 1])
            (loss / ACCUMULATE).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def dice(model: nn.Module, inputs: Tensor, masks: Tensor) -> float:
    """Mean overlap of prediction and mask, ``2 |A and B| / (|A| + |B|)``."""
    found = (model(inputs) > 0).float()
    both = (found * masks).flatten(1).sum(1)
    return float((2 * both / (found + masks).flatten(1).sum(1).clamp(min=1)).mean())


def main() -> None:
    """Train with each method and judge the folded model, the one to deploy, on volumes that were not seen."""
    rates = {sys.argv[1]: float(sys.argv[2])} if len(sys.argv) == 3 else RATES
    inputs, masks = volumes(50, seed=2)
    for method, lr in rates.items():
        model = normkit.fold(train(method, lr), example=inputs[:1])
        print(f"{method:>20}, lr {lr:g}: Dice {dice(model, inputs, masks):.3f}")


if __name__ == "__main__":
    main()
