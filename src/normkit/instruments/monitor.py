"""Watch a training run with one object: cheap figures at every step, the instruments at intervals."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from normkit.inspection.graph import producers, rectified
from normkit.inspection.probe import Objective, Probe, unwrap
from normkit.instruments._angular import rotation
from normkit.instruments._channels import Channels, LayerChannels, watch_channels
from normkit.instruments._covariate_shift import snapshot
from normkit.instruments._curvature import along
from normkit.instruments._gradient_removed import removed, watch_gradients
from normkit.instruments._landscape import step_sizes, walk
from normkit.instruments.result import axes, label, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

_FLUSH = 50  # steps whose figures wait on the device, so that most steps need no synchronisation


class Monitor:
    r"""Records measurements of a training run without disturbing it.

    Every step: loss, norm of the gradient, learning rate. Every ``every`` steps, from the first one on: the walk along
    the gradient (loss band, predictiveness, beta), curvature along the gradient and stability ratio, share of the
    gradient that batch normalization removes, state of the channels, rotation of the weights. A measurement takes about
    as long as 14 training steps.

    Under ``DistributedDataParallel`` every rank must call ``observe``; figures are averaged over the ranks, and
    rank 0 writes.

    Args:
        model: The model that is trained, wrapped or not.
        objective: ``loss = objective(model, batch)``.
        optimizer: Its optimizer; the learning rate of its first group is the unit of the walk.
        every: Steps from one measurement to the next.
        steps: Number of step sizes of the walk.
        span: Smallest and largest step size of the walk, in units of the learning rate.
        path: JSON lines file to append to, one line per step.
        tensorboard: Folder for TensorBoard.

    Attributes:
        history: The records of the measured steps.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> objective = lambda model, batch: model(batch).square().mean()
        >>> with Monitor(model, objective, optimizer, every=2) as monitor:
        ...     for batch in torch.randn(3, 8, 2):
        ...         optimizer.zero_grad()
        ...         loss = objective(model, batch)
        ...         loss.backward()
        ...         monitor.observe(batch, loss)
        ...         optimizer.step()
        >>> [record["step"] for record in monitor.history], sorted(monitor.history[0]["landscape"])[:2]
        ([0, 2], ['beta', 'beta_step_size'])
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        every: int = 2000,
        *,
        steps: int = 8,
        span: tuple[float, float] = (1 / 8, 4),
        path: Path | str | None = None,
        tensorboard: Path | str | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it counts steps and must be at least 1")
        self.model, self.objective, self.optimizer, self.every = model, objective, optimizer, every
        self.steps, self.span = steps, span
        self.history: list[dict[str, Any]] = []
        self._step = 0
        self._waiting: list[tuple[dict[str, Any], Tensor | float, Tensor]] = []  # record, loss, norms of gradients
        self._before: dict[str, Tensor] | None = None
        self._parallel = isinstance(model, DistributedDataParallel)
        writes = not self._parallel or dist.get_rank() == 0
        self._file = Path(path).open("a", encoding="utf-8") if path is not None and writes else None  # noqa: SIM115
        self._board = _board(tensorboard) if tensorboard is not None and writes else None
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._before_relu: frozenset[str] | None = None  # these two from tracing the model once
        self._fed_by: dict[str, str] | None = None

    def observe(self, batch: Any, loss: Tensor | float) -> None:
        """Record one step: call it once per step, after ``backward()`` and before ``optimizer.step()``.

        With a GradScaler call ``scaler.unscale_(optimizer)`` first, else the norm of the gradient is the scaled one.

        Args:
            batch: The batch of this step; under accumulation, the last one.
            loss: Its loss.
        """
        record: dict[str, Any] = {"step": self._step, "lr": float(self.optimizer.param_groups[0]["lr"])}
        norms = _norms([g for p in self._parameters if (g := p.grad) is not None])
        value = loss
        if isinstance(loss, Tensor):  # a loss on another device would have to be waited for
            value = loss.item() if loss.is_cpu else loss.detach().clone()
        if self._step % self.every == 0:
            record.update(self._measure(batch, record["lr"]))
            self._before = snapshot(self.model)
            self.history.append(record)
        self._waiting.append((record, value, norms))
        self._step += 1
        if len(self._waiting) >= _FLUSH:
            self.flush()

    def _measure(self, batch: Any, lr: float) -> dict[str, Any]:
        with Probe(self.model, self.objective, batch) as probe:
            if self._before_relu is None:
                self._before_relu = rectified(probe.model)
            layers: list[LayerChannels] = []
            gradients: dict[str, tuple[Tensor, Tensor]] = {}
            with ExitStack() as watching:
                watching.enter_context(watch_channels(probe, self._before_relu, layers))
                watching.enter_context(watch_gradients(probe, gradients))
                loss, gradient = probe.gradients()
            directional = along(probe, gradient)
            found: dict[str, Any] = {"curvature": {"directional": directional, "stability": lr * directional / 2}}
            if lr > 0:  # a warm-up may start at zero, from where there is no step to look along
                path = walk(probe, loss, gradient, step_sizes(lr, self.steps, self.span))
                found["landscape"] = {
                    "loss_low": path.loss_band[0],
                    "loss_high": path.loss_band[1],
                    "change_low": path.predictiveness[0],
                    "change_high": path.predictiveness[1],
                    "beta": path.beta,
                    "beta_step_size": path.beta_step_size,
                }
        found["removed"] = removed(gradients).layers
        found["channels"] = Channels(tuple(layers)).summary()
        return found

    def _after_step(self, *_: Any) -> None:
        if self._before is not None and self.history:
            if self._fed_by is None:
                self._fed_by = producers(unwrap(self.model))
            turned = rotation(unwrap(self.model), self.optimizer, self._before, self._fed_by).layers
            self.history[-1]["angular"] = {a.layer: {"angle": a.angle, "equilibrium": a.equilibrium} for a in turned}
            self._before = None

    def flush(self) -> None:
        """Write the records that are not written yet."""
        if not self._waiting:
            return
        device = self._waiting[0][2].device
        values = [value for _, value, _ in self._waiting]
        if any(isinstance(value, Tensor) for value in values):
            losses = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).reshape(()) for v in values])
        else:
            losses = torch.tensor(values, dtype=torch.float32, device=device)
        lengths = [norms.to(device) for *_, norms in self._waiting]
        alike = len({len(norms) for norms in lengths}) == 1
        together = torch.stack(lengths) if alike else pad_sequence(lengths, batch_first=True)
        figures = torch.stack([losses, torch.linalg.vector_norm(together, dim=1).float()], 1)
        if self._parallel:
            dist.all_reduce(figures.div_(dist.get_world_size()))
        for (record, *_), (loss, size) in zip(self._waiting, figures.tolist(), strict=True):
            if self._parallel and "landscape" in record:
                _average(record, figures.device)
            record.update(loss=loss, gradient_norm=size)
            if self._file is not None:
                self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            if self._board is not None:
                for name, value in _flat(record):
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, record["step"])
        self._waiting.clear()
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write the remaining records, and release the optimizer and the files; a second call does nothing."""
        self.flush()
        self._hook.remove()
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
        self._file = self._board = None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the loss along the gradient over the steps, as a band."""
        ax = axes(ax)
        walked = [record for record in self.history if "landscape" in record]
        steps = [record["step"] for record in walked]
        low, high = ([record["landscape"][key] for record in walked] for key in ("loss_low", "loss_high"))
        ax.fill_between(steps, low, high, alpha=0.4)
        return label(ax, "loss along the gradient", "step", "loss")


def _norms(gradients: list[Tensor]) -> Tensor:
    """Norm of each gradient; that of all is left to the flush, so that a step has few operations."""
    if not gradients:
        return torch.zeros(1)
    try:
        return torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    except (RuntimeError, NotImplementedError):  # sparse gradients, or several devices
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        return torch.stack([n.to(dense[0].device) for n in torch._foreach_norm(dense)])  # pyright: ignore


def _board(folder: Path | str) -> "SummaryWriter":
    """A TensorBoard writer.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(f"tensorboard={str(folder)!r} needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(folder))


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Numbers with their path.

    Yields:
        ``("landscape/beta", 3.0)`` and so on.
    """
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _average(record: dict[str, Any], device: torch.device) -> None:
    """Average all numbers of a record over the ranks, in place."""
    numbers = [float("nan") if value is None else float(value) for _, value in _flat(record)]
    vector = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(vector.div_(dist.get_world_size()))
    means = iter(vector.tolist())

    def fill(part: dict[str, Any]) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                fill(value)
            else:
                mean = next(means)
                part[name] = None if value is None else round(mean) if name == "step" else mean

    fill(record)
