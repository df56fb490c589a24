"""What watching costs: python benchmarks/monitor.py [--quick] [--device cuda] [--threads 2] [--every 200].

Timed in turns are a plain training step and the same step with the Monitor between two measurements, then a plain step and one
with a measurement. The overhead at a cadence of ``every`` steps is put together from the ratios:
``watched / plain - 1 + (measured / plain - 1) / every``.
"""

import argparse
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normkit
from common import interleaved, save, timer
from normkit.instruments import Monitor
from normkit.study.models import build_model

EVERY = 2000
FLUSH = 50  # steps between two flushes of the Monitor; a ratio is taken over as many
CASES = (("resnet20", (3, 32, 32), 128), ("resnet20", (3, 32, 32), 8), ("digits-cnn", (1, 8, 8), 64))


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def measure(
    method: str, name: str, shape: tuple[int, ...], batch_size: int, rounds: int, device: str, every: int = EVERY
) -> dict:
    """Paired times of the three kinds of step, and the overhead at a cadence of ``every`` steps."""
    torch.manual_seed(0)
    batch = torch.randn(batch_size, *shape, device=device), torch.randint(10, (batch_size,), device=device)
    model = build_model(name, input_shape=shape, classes=10).to(device)
    model, optimizer = normkit.apply(method, model, lr=0.01, batches=[batch[0]])
    rare = Monitor(model, objective, optimizer, every=10**9)
    always = Monitor(model, objective, optimizer, every=1)

    def step(monitor: Monitor | None, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss = objective(model, batch)
            loss.backward()
            if monitor is not None:
                monitor.observe(batch, loss)
            optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    rare.observe(batch, 0.0)  # its first step is a measurement
    count = 3 if batch_size > 64 else 20
    single = {"plain": lambda: step(None, 1), "watched": lambda: step(rare, 1)}
    turns = interleaved(single, FLUSH * rounds, timer(device))  # they differ by little, so single steps take turns
    whole = interleaved(
        {"plain": lambda: step(None, count), "measured": lambda: step(always, 1)}, rounds, timer(device)
    )
    rare.close()
    always.close()
    plain, watched = ([sum(times[i : i + FLUSH]) for i in range(0, len(times), FLUSH)] for times in turns.values())
    measurement_steps = median(m * count / p for p, m in zip(whole["plain"], whole["measured"], strict=True))
    share = (measurement_steps - 1) / every
    overheads = sorted(w / p - 1 + share for p, w in zip(plain, watched, strict=True))
    return {
        "method": method,
        "model": name,
        "batch_size": batch_size,
        "device": device,
        "every": every,
        "step_ms": 1e3 * median(plain) / FLUSH,
        "measurement_steps": measurement_steps,
        "overhead": {
            "median": median(overheads),
            "low": overheads[len(overheads) // 4],
            "high": overheads[-1 - len(overheads) // 4],
        },
    }


def main() -> None:
    """Measure every case for batch normalization, and BNP on one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds only; the result is not written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=EVERY, help="steps from one measurement to the next")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 2 if arguments.quick else 7
    rows = []
    for method, case in [("batch", case) for case in CASES] + [("bnp", CASES[0])]:
        rows.append(measure(method, *case, rounds, arguments.device, arguments.every))
        row, cost = rows[-1], rows[-1]["overhead"]
        print(
            f"{row['model']}, {method}, batch {row['batch_size']:>3}: {cost['median']:.1%} "
            f"({cost['low']:.1%} to {cost['high']:.1%}) of the training time at one measurement in {arguments.every} steps; "
            f"a measurement costs {row['measurement_steps']:.1f} steps"
        )
    if not arguments.quick:
        name = "monitor" if arguments.device == "cpu" else "monitor-gpu"
        options = f"--device {arguments.device} --threads {arguments.threads} --every {arguments.every}"
        save(name, f"python benchmarks/monitor.py {options}", rows)


if __name__ == "__main__":
    main()
