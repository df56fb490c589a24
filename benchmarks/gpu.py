"""What only a GPU can tell, in one command: tests, step time and peak memory, training.

    python benchmarks/gpu.py --minutes 9 --data PATH/TO/cifar10     # everything, most valuable first
    python benchmarks/gpu.py --wheels DIR --python 3.12             # beforehand: packages for a machine without network
    python benchmarks/gpu.py --device cpu --minutes 0.2 --out DIR   # the rehearsal: every piece, as small as possible

Needs torch 2.11 or later and numpy; pytest for the tests, pyarrow and pillow to read images, geoopt for its optimizers: what is
missing is left out, and the file says so. Every row is written to OUT/PIECE.json when it is measured. The same command again
does what is missing. Pieces, in this order:

    tests         the GPU tests and the kernels' tests: parity with the CPU, mixed precision, compile, CUDA graphs, NCCL
    steps         step time and peak memory: ResNet-18, ResNet-50 at 224, a 3-D U-Net at 96^3, bf16 and fp32, batch 64 to 1
    accumulation  an effective batch of 256 from micro-batches of 16 to 1, against BatchNorm on all 256
    optimizers    one optimizer step on the shapes of ResNet-50 and ResNet-20
    training      CIFAR-10, ResNet-18: batch 128, 8, 2, three seeds, many processes on one GPU
    compiled      the steps under torch.compile
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import normkit  # noqa: E402
import riemannian  # noqa: E402
from common import interleaved, ratio, synchronized  # noqa: E402
from normkit.study.data.augmentation import Augmentation, augment  # noqa: E402
from normkit.study.environment import environment  # noqa: E402
from normkit.study.models import build_model  # noqa: E402

METHODS = ("batch", "none", "group", "group+ws", "group+bnp", "bnp", "batchless", "batchless-projected", "sgd-g")
TRAINED = ("batch", "group+ws", "group+bnp", "bnp", "group", "sgd-g", "batchless-projected")
WHEELS = ("optuna", "tyro", "rich", "datasets", "geoopt", "pytest", "pytest-timeout", "pytest-xdist")
NEEDED = [
    "alembic",
    "colorlog",
    "sqlalchemy",
    "mako",
    "greenlet",
    "docstring-parser",
    "typeguard",
    "execnet",
    "multiprocess",
    "dill",
]  # by them
fork = multiprocessing.get_context(
    "fork"
)  # children start with everything imported; this process never touches the GPU


class Table:
    """The rows of one piece, in a file that is complete after each row.

    Args:
        file: Where they are.
        settings: What all rows have in common; rows of a file with other settings are not taken over.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        kept = json.loads(file.read_text()) if file.exists() else {}
        self.rows: dict[str, Any] = kept.get("rows", {}) if kept.get("settings") == settings else {}

    def add(self, key: str, row: Any) -> None:
        """Keep a row and write the file."""
        self.rows[key] = row
        text = {
            "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
            "machine": machine(self.settings["device"]),
            "settings": self.settings,
            "rows": self.rows,
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)
        print(f"  {key}: {json.dumps(row)[:200]}", flush=True)


def machine(device: str) -> dict[str, Any]:
    """The machine: versions and, of a GPU, what its speed depends on."""
    found: dict[str, Any] = {**environment(device), "cores": os.cpu_count()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        if find_spec("triton"):
            import triton

            found["triton"] = triton.__version__
    return found


class UNet3d(nn.Module):
    """The 3-D U-Net of Çiçek et al. (arXiv 1606.06650): halved ``levels`` times, widths doubled, skips concatenated."""

    def __init__(self, width: int = 32, levels: int = 3, classes: int = 3) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (inputs, outputs):
                layers += [nn.Conv3d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList(map(block, [1, *widths], widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(w, w // 2, 2, 2) for w in widths[:0:-1])
        self.join = nn.ModuleList(block(w, w // 2) for w in widths[:0:-1])
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes, D, H, W)``."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


class Case:
    """A network with a batch on the device, and steps of any method on it.

    Args:
        net: ``resnet18``, ``resnet50`` or ``unet3d``.
        dtype: ``bf16`` (autocast, channels last) or ``fp32``.
        batch: Samples.
        device: Where.
    """

    def __init__(self, net: str, dtype: str, batch: int, device: str) -> None:
        self.net, self.dtype, self.device = net, dtype, device
        small = device == "cpu"
        torch.manual_seed(0)
        if net == "unet3d":
            side = 8 if small else 96
            self.x, self.model = torch.randn(batch, 1, *[side] * 3), UNet3d(4, 1) if small else UNet3d()
            self.y = torch.randint(3, (batch, *[side] * 3))
        else:
            side, name = (8, "digits-cnn") if small else (224, f"{net}-imagenet")
            self.x, self.y = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
            self.model = build_model(name, input_shape=(3, side, side), classes=10)
        self.x, self.y = self.x.to(device), self.y.to(device)
        if dtype == "bf16":
            self.x = self._last(self.x)

    def _last(self, what: Any) -> Any:
        return what.to(memory_format=torch.channels_last_3d if self.net == "unet3d" else torch.channels_last)

    def step(
        self, method: str, *, micro: int | None = None, compiled: bool = False, lr: float = 1e-3
    ) -> Callable[[], None]:
        """A training step of ``method`` on the whole batch, in micro-batches of ``micro``."""
        model = copy.deepcopy(self.model).to(self.device)
        model = self._last(model) if self.dtype == "bf16" else model
        parts = list(zip(self.x.split(micro or len(self.x)), self.y.split(micro or len(self.x)), strict=True))
        model, optimizer = normkit.apply(method, model, lr=lr, batches=[self.x[:8]])
        forward = torch.compile(model) if compiled else model

        def step() -> None:
            optimizer.zero_grad()
            for x, y in parts:
                with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16"):
                    loss = F.cross_entropy(forward(x), y) / len(parts)
                loss.backward()
            optimizer.step()

        return step


def peak(step: Callable[[], None], device: str) -> int | None:
    """Peak bytes that a step allocates beyond what is allocated before it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def warm(steps: dict[str, Callable[[], None]], device: str, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Run each task ``count`` times; peak memory of those that work, and what went wrong with the others."""
    peaks, errors = {}, {}
    for name, step in steps.items():
        try:
            for _ in range(count):
                step()
            peaks[name] = peak(step, device)
        except Exception as error:  # out of memory, say: the other methods go on
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if device == "cuda":
                torch.cuda.empty_cache()
    return peaks, errors


def measured(
    steps: dict[str, Callable[[], None]], reference: str | None, device: str, *, rounds: int = 7, first: int = 3
) -> dict[str, Any]:
    """Milliseconds of a step, ratios to ``reference`` within each round, and peak memory, per method.

    Args:
        steps: A step of each method.
        reference: Method that the others are compared with, or None.
        device: Where.
        rounds: How often each is timed at most; slow steps less often.
        first: Steps before anything is measured.
    """
    peaks, errors = warm(steps, device, first)
    working = {name: steps[name] for name in peaks}
    start = time.perf_counter()
    for step in working.values():
        synchronized(step, 1, device)()
    each = (time.perf_counter() - start) / max(1, len(working))
    repeats = max(1, min(20, round(0.05 / each)))
    rounds = max(min(3, rounds), min(rounds, round(1 / each)))
    seconds = interleaved({name: synchronized(step, repeats, device) for name, step in working.items()}, rounds)
    result: dict[str, Any] = {}
    for name, times in seconds.items():
        result[name] = {"milliseconds": 1e3 * median(times) / repeats, "peak_bytes": peaks[name]}
        if reference in seconds and name != reference:
            result[name][f"over {reference}"] = ratio(times, seconds[reference])
    return {**result, **{name: {"error": error} for name, error in errors.items()}}


def tests(table: Table, deadline: float, args: argparse.Namespace) -> None:
    """Run pytest on the GPU tests and the kernels' tests; one row per test."""
    if table.rows.get("summary", {}).get("exit") in (0, 1):
        return
    if not find_spec("pytest"):
        table.add("missing", "install pytest, see --wheels")
        return
    table.rows.clear()
    paths = ["tests/gpu", "tests/methods/kernels/test_kernels.py", "tests/methods/riemannian/test_triton_kernel.py"]
    if args.device == "cpu":
        paths = ["tests/gpu", "-k", "bnp and float64"]
    many = ["-n", "8"] if find_spec("xdist") and args.device == "cuda" else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or not gpu", "-W", "default", *many, *paths]
        variables = {
            "PYTHONPATH": str(ROOT / "src"),
            "NORMKIT_GPU_TESTS": args.device,
            "NORMKIT_GPU_TESTS_LOG": str(log),
        }
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | variables,
                timeout=max(1.0, deadline - time.monotonic()),
                capture_output=True,
                text=True,
                check=False,
            )
            code, end = done.returncode, (done.stdout + done.stderr)[-2000:]
        except subprocess.TimeoutExpired:
            code, end = None, "stopped: no time left"
        for line in log.read_text().splitlines() if log.exists() else ():
            row = json.loads(line)
            table.rows[row.pop("test")] = row
    outcomes = [row["outcome"] for row in table.rows.values()]
    table.add("summary", {"exit": code, **{o: outcomes.count(o) for o in sorted(set(outcomes))}, "end": end})


def cases(device: str) -> Iterator[tuple[str, str, int]]:
    """Network, dtype and batch size of the step table, most valuable first.

    Yields:
        One case.
    """
    if device == "cpu":
        yield from (("resnet18", "bf16", 2), ("unet3d", "fp32", 1))
        return
    for dtype in ("bf16", "fp32"):
        for batch in (64, 8, 2, 1):
            yield "resnet50", dtype, batch
            if batch < 64:  # 64 volumes of this size are no batch that anybody trains with
                yield "unet3d", dtype, batch
    for dtype in ("bf16", "fp32"):
        for batch in (64, 8, 2, 1):
            yield "resnet18", dtype, batch


def steps(table: Table, deadline: float, args: argparse.Namespace) -> None:
    """Step time and peak memory of every method; one row per network, dtype and batch size."""
    for net, dtype, batch in cases(args.device):
        key = f"{net}/{dtype}/{batch}"
        if key in table.rows or time.monotonic() > deadline:
            continue
        case = Case(net, dtype, batch, args.device)
        table.add(key, measured({m: case.step(m) for m in METHODS}, "batch", args.device))
        del case
        if args.device == "cuda":
            torch.cuda.empty_cache()


def accumulation(table: Table, deadline: float, args: argparse.Namespace) -> None:
    """An effective batch of 256; one row per method and micro-batch, its time and memory those of BatchNorm on 256."""
    whole = 4 if args.device == "cpu" else 256
    case = Case("resnet18", "bf16", whole, args.device)
    for micro in (whole, 16, 8, 4, 2, 1):
        key = f"resnet18/{whole}/{micro}"
        if micro > whole or key in table.rows or time.monotonic() > deadline:
            continue
        names = ("batch",) if micro == whole else ("batchless", "bnp", "batchless-projected")
        tasks = {name: case.step(name, micro=micro) for name in names}
        table.add(key, measured(tasks, None, args.device, rounds=1, first=1))
        if args.device == "cpu" and micro < whole:
            return


def optimizers(table: Table, deadline: float, args: argparse.Namespace) -> None:
    """One step of SGDG and AdamG, against torch's and others' optimizers; one row per network's shapes."""
    if missing := [name for name in ("geoopt", "adamp") if not find_spec(name)]:
        table.rows["missing"] = missing
    for shapes in ("resnet20",) if args.device == "cpu" else ("resnet50", "resnet20"):
        if shapes not in table.rows and time.monotonic() < deadline:
            table.add(
                shapes, riemannian.benchmark(shapes, args.device, *((1, 1) if args.device == "cpu" else (10, 10)))
            )


def images(path: str | None) -> list[Tensor]:
    """CIFAR-10 as uint8: training images and labels, test images and labels.

    Args:
        path: A folder with ``*train*`` and ``*test*`` files, Parquet or Arrow, of encoded images and labels; None, in the
            rehearsal alone, makes images up.
    """
    if path is None:
        x, y = torch.randint(256, (192, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (192,))
        return [x[:128], y[:128], x[128:], y[128:]]
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from PIL import Image

    splits = []
    for split in ("train", "test"):
        files = sorted(f for f in Path(path).rglob(f"*{split}*") if f.suffix in (".parquet", ".arrow"))
        if not files:
            raise SystemExit(f"--data {path}: no *{split}*.parquet or *{split}*.arrow in it")
        tables = [parquet.read_table(f) if f.suffix == ".parquet" else pa.ipc.open_stream(f).read_all() for f in files]
        whole = pa.concat_tables(tables).to_pydict()
        encoded = whole.get("img") or whole["image"]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(one["bytes"])).convert("RGB")) for one in encoded])
        splits += [torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(whole["label"])]
    return splits


def trained(
    data: list[Tensor], job: tuple[str, int, int], epochs: float, device: str, deadline: float
) -> dict[str, Any] | None:
    """One run: test accuracy and its curve; None if there was no time to finish it."""
    method, batch, seed = job
    x, y, test_x, test_y = (t.to(device) for t in data)
    mean, std = x.float().mean((0, 2, 3), keepdim=True), x.float().std((0, 2, 3), keepdim=True)
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)

    def prepared(raw: Tensor) -> Tensor:
        return ((raw - mean) / std).to(memory_format=torch.channels_last)

    recipe = normkit.recipes()[method]
    lr = recipe.lr * (batch / 64) ** recipe.lr_exponent
    network = "digits-cnn" if device == "cpu" else "resnet18"
    model = build_model(network, input_shape=(3, 32, 32), classes=10).to(device, memory_format=torch.channels_last)
    start = prepared(x[torch.randperm(len(x), generator=draws)[:1024].to(device)]).split(128)
    model, optimizer = normkit.apply(method, model, lr=lr, batches=start, weight_decay=0.0)
    total = max(1, round(epochs * len(x) / batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order, curve, begin = torch.empty(0, dtype=torch.long), [], time.perf_counter()

    def accuracy() -> float:
        model.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            right = [
                (model(prepared(i)).argmax(1) == t).sum()
                for i, t in zip(test_x.split(1000), test_y.split(1000), strict=True)
            ]
        model.train()
        return float(sum(right)) / len(test_y)

    for number in range(1, total + 1):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=draws)
        rows, order = order[:batch].to(device, non_blocking=True), order[batch:]
        inputs = augment(x[rows], Augmentation(flip=True, crop=4), torch.rand(batch, 3, generator=draws))
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(prepared(inputs)), y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        if number % max(1, total // 5) == 0:
            curve.append({"epochs": number * batch / len(x), "accuracy": accuracy(), "loss": loss.item()})
            spent = time.perf_counter() - begin
            if number < total and time.monotonic() + spent * (total / number - 1) > deadline:
                return None
    return {"lr": lr, "steps": total, "seconds": time.perf_counter() - begin, "accuracy": accuracy(), "curve": curve}


def training(table: Table, deadline: float, args: argparse.Namespace) -> None:
    """Runs in parallel processes; one row per run. A run that the time left does not suffice for is not kept."""
    if args.data is None and args.device == "cuda":
        table.add("missing", "give --data: made-up images say nothing about methods")
        return
    table.rows.pop("missing", None)
    epochs = {2: 0.1} if args.device == "cpu" else {8: args.epochs / 30, 128: args.epochs, 2: args.epochs / 120}
    seeds = range(1 if args.device == "cpu" else 3)
    names = TRAINED[:2] if args.device == "cpu" else TRAINED
    jobs = [(m, b, s) for s in seeds for b in epochs for m in names if f"{m}/{b}/{s}" not in table.rows]
    data = images(args.data) if jobs else []  # before the fork: workers share its memory
    waiting, done = fork.Queue(), fork.Queue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        torch.set_num_threads(1)
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                method, batch, seed = job = waiting.get(timeout=0.5)
                try:
                    row: Any = trained(data, job, epochs[batch], args.device, deadline)
                except Exception as error:  # one run's end is not that of the others
                    row = {"error": f"{type(error).__name__}: {error}"[:300]}
                done.put((f"{method}/{batch}/{seed}", row))

    workers = [fork.Process(target=work, daemon=True) for _ in range(min(args.processes, len(jobs)))]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            key, row = done.get(timeout=0.2)
            if row is not None:
                table.add(key, row)
    with contextlib.suppress(queue.Empty):
        while True:
            key, row = done.get(timeout=0.2)
            if row is not None:
                table.add(key, row)
    for worker in workers:
        worker.kill()


def compiled(table: Table, deadline: float, args: argparse.Namespace) -> None:
    """The steps under torch.compile; the compiler's cache is filled by one process per method first."""
    if args.device == "cpu":
        table.add("missing", "compiling takes longer than a rehearsal")
        return
    found = [("resnet50", "bf16", 64), ("resnet18", "bf16", 8), ("unet3d", "bf16", 2)]
    found = [case for case in found if "/".join(map(str, case)) not in table.rows]

    def fill(case: tuple[str, str, int], method: str) -> None:
        Case(*case, args.device).step(method, compiled=True)()

    filled = []
    for case in found:  # before this process touches the GPU, which it could not share with children then
        if time.monotonic() > deadline - 90:
            break
        workers = [fork.Process(target=fill, args=(case, method), daemon=True) for method in METHODS]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(1.0, deadline - 45 - time.monotonic()))
            worker.kill()
        filled.append(case)
    for case in filled:
        if time.monotonic() < deadline:
            one = Case(*case, args.device)
            tasks = {f"{m}, compiled": one.step(m, compiled=True) for m in METHODS} | {"batch": one.step("batch")}
            table.add("/".join(map(str, case)), measured(tasks, "batch, compiled", args.device))


# share of the time that a piece may take at most; what it leaves goes to the next ones
PIECES: dict[str, tuple[float, Callable[[Table, float, argparse.Namespace], None]]] = {
    "tests": (0.25, tests),
    "steps": (0.25, steps),
    "accumulation": (0.1, accumulation),
    "optimizers": (0.05, optimizers),
    "training": (0.4, training),
    "compiled": (1.0, compiled),
}


def collect(folder: str, python: str) -> None:
    """Download what a Linux machine without network may lack, in the versions that are tested."""
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014")]
    target = ["--only-binary=:all:", "--python-version", python, *platforms]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--dest",
        folder,
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([*command, *target, *WHEELS, *NEEDED], check=True)
    print(f"there: python -m pip install --no-index --find-links {folder} {' '.join(WHEELS)}")


def isolated(piece: Callable[..., None], *arguments: Any) -> None:
    """Run a piece as the leader of its processes."""
    os.setsid()
    piece(*arguments)


def main() -> None:
    """Parse and run the pieces, each in a process of its own, which may crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", help="folder with CIFAR-10 as Parquet or Arrow files")
    parser.add_argument(
        "--epochs", type=float, default=15.0, help="of a run at batch 128; 1/30 of them at 8, 1/120 at 2"
    )
    parser.add_argument("--processes", type=int, default=min(10, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "gpu"), help="folder of the results")
    parser.add_argument("--wheels", metavar="DIR", help="collect packages there, and stop")
    parser.add_argument(
        "--python", default="{}.{}".format(*sys.version_info), help="version that --wheels collects for"
    )
    args = parser.parse_args()
    if args.wheels:
        collect(args.wheels, args.python)
        return
    end = time.monotonic() + 60 * args.minutes
    Path(args.out).mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.pieces:
        share, piece = PIECES[name]
        deadline = min(end, time.monotonic() + share * 60 * args.minutes)
        if args.device == "cpu":
            deadline = time.monotonic() + 60  # the rehearsal does the least of every piece, however slow the machine
        elif time.monotonic() >= end:
            print(f"{name}: no time left; the same command again does it")
            continue
        settings = {"device": args.device, **({"epochs": args.epochs} if name == "training" else {})}
        table = Table(Path(args.out, f"{name}.json"), settings)
        print(f"{name}: at most {deadline - time.monotonic():.0f} s, {len(table.rows)} rows there", flush=True)
        child = fork.Process(target=isolated, args=(piece, table, deadline, args))
        child.start()
        child.join(max(1.0, deadline + 15 - time.monotonic()))
        if child.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid or 0, signal.SIGKILL)
            print(f"{name}: stopped")
        elif child.exitcode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
