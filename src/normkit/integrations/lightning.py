"""Callbacks for Lightning: BNP, batchless normalization and the Monitor in a ``Trainer`` that is otherwise as it was.

Lightning runs forward and backward inside the optimizer's closure, then ``on_before_optimizer_step``, then clips. So BNP
preconditions before clipping, as it should, and its statistics travel in the optimizer's part of a checkpoint.
"""

from typing import Any

from torch.optim import Optimizer

from normkit.inspection.probe import Objective
from normkit.instruments import Monitor
from normkit.methods.batchless.training import RATE, attach
from normkit.methods.bnp.bnp import BNP
from normkit.optim.step_hooks import StepHandle

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ImportError as missing:
    raise ImportError(f"{missing}; these callbacks need an extra: pip install 'normkit[lightning]'") from missing


def only_optimizer(trainer: Trainer, what: str) -> Optimizer:
    """The trainer's optimizer.

    Raises:
        ValueError: There are several, or none.
    """
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"{what} needs exactly one optimizer, configure_optimizers() returned {len(trainer.optimizers)}; with several, "
            "attach to each by hand: normkit.BNP(part).attach(optimizer), normkit.attach(part, optimizer)"
        )
    return trainer.optimizers[0]


class BNPCallback(Callback):
    """Preconditions gradients by batch normalization preconditioning, before Lightning clips them.

    Args:
        options: Options of [`normkit.BNP`][].

    Examples:
        >>> trainer = Trainer(callbacks=[BNPCallback()], gradient_clip_val=1.0)  # doctest: +SKIP
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.bnp: BNP | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, before a checkpoint's optimizer state is restored."""
        self.bnp = BNP(pl_module, **self.options)
        self.bnp.attach(only_optimizer(trainer, "BNPCallback"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Precondition; the step itself then leaves the gradients as clipping made them."""
        assert self.bnp is not None
        self.bnp.precondition_()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take everything off the model."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._remove()

    def _remove(self) -> None:
        if self.bnp is not None:
            self.bnp.remove()
            self.bnp = None


class BatchlessCallback(Callback):
    """Trains mu and sigma of a module's batchless layers; convert and initialize it before the fit.

    The likelihood's gradient never lies in ``.grad``: clipping and loss scaling do not see it.

    Args:
        rate: Rate of mu and sigma, see [`normkit.attach`][].
    """

    def __init__(self, rate: float = RATE) -> None:
        self.rate = rate
        self._handle: StepHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizer."""
        self._handle = attach(pl_module, only_optimizer(trainer, "BatchlessCallback"), rate=self.rate)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class MonitorCallback(Callback):
    """Watches a fit with [`normkit.instruments.Monitor`][], on the batches and losses of the fit itself.

    Args:
        objective: ``loss = objective(pl_module, batch)``, without logging.
        options: Options of the Monitor: ``every``, ``path``, ``tensorboard`` ...

    Attributes:
        monitor: The Monitor; its ``history`` stays readable after the fit.
    """

    def __init__(self, objective: Objective, **options: Any) -> None:
        self.objective, self.options = objective, options
        self.monitor: Monitor | None = None
        self._batch: Any = None
        self._loss: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching."""
        self.monitor = Monitor(pl_module, self.objective, only_optimizer(trainer, "MonitorCallback"), **self.options)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Remember the loss, whole where Lightning divided it for accumulation."""
        self._loss = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look, between backward and the step."""
        assert self.monitor is not None
        self.monitor.observe(self._batch, self._loss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is waiting."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
