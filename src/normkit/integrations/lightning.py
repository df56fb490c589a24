"""Use normkit with Lightning: callbacks for methods and the Monitor, and a task made from a module and its data.

Lightning runs forward and backward inside the optimizer's closure, then ``on_before_optimizer_step``, then clips. So BNP
preconditions before clipping, as it should, and its statistics travel in checkpoints, with the optimizer and the callback.
With manual optimization the module clips before it steps, by ``self.clip_gradients(...)``: BNP preconditions at the start of
that call.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from normkit.inspection.probe import Objective
from normkit.instruments import Monitor
from normkit.methods.batchless.training import RATE, attach_behind_scheduler
from normkit.methods.bnp.bnp import BNP
from normkit.study.data.structure import tensors
from normkit.study.task import Task

try:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ImportError as missing:
    raise ImportError(f"{missing}; these callbacks need an extra: pip install 'normkit[lightning]'") from missing


logger = logging.getLogger(__name__)


def only_optimizer(trainer: Trainer, what: str) -> Optimizer:
    """Return the trainer's only optimizer.

    Raises:
        ValueError: There are several, or none.
    """
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"{what} needs exactly one optimizer, configure_optimizers() returned {len(trainer.optimizers)}; with several, "
            "attach to each by hand: normkit.BNP(part).attach(optimizer), normkit.attach(part, optimizer)"
        )
    return trainer.optimizers[0]


class MethodCallback(Callback):
    """Attaches a method to the trainer's optimizer for the length of a fit.

    Args:
        attach: ``attach(pl_module, optimizer)``, which returns something with a ``remove()``.

    Examples:
        >>> trainer = Trainer(callbacks=[MethodCallback(normkit.attach)])  # doctest: +SKIP
    """

    def __init__(self, attach: Callable[[LightningModule, Optimizer], Any]) -> None:
        self._attach = attach
        self._attached: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, before a checkpoint's optimizer state is restored."""
        self._attached = self._attach(pl_module, only_optimizer(trainer, type(self).__name__))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach from the model."""
        self._remove(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach from the model."""
        self._remove(pl_module)

    def _remove(self, pl_module: LightningModule) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


class BNPCallback(MethodCallback):
    """Preconditions gradients by batch normalization preconditioning, before Lightning clips them.

    Args:
        options: Options of [`normkit.BNP`][].

    Attributes:
        bnp: The BNP during a fit, else None.

    Examples:
        >>> trainer = Trainer(callbacks=[BNPCallback()], gradient_clip_val=1.0)  # doctest: +SKIP
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(self._attach_bnp)
        self.options = options
        self._ended: dict[str, Any] = {}  # statistics of the fit that ended
        self._resumed: dict[str, Any] = {}  # of the checkpoint that is resumed

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics, also after the fit has ended."""
        return self._ended if self.bnp is None else self.bnp.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the running statistics of a checkpoint for the fit that is about to start."""
        self._resumed = state_dict

    def _attach_bnp(self, pl_module: LightningModule, optimizer: Optimizer) -> BNP:
        bnp = BNP(pl_module, **self.options)
        bnp.attach(optimizer)
        if self._resumed:
            bnp.load_state_dict(self._resumed)
            self._resumed = {}
        clip_gradients = pl_module.clip_gradients

        def precondition_and_clip(*args: Any, **kwargs: Any) -> None:
            bnp.precondition_()
            clip_gradients(*args, **kwargs)

        vars(pl_module)["clip_gradients"] = precondition_and_clip
        return bnp

    @property
    def bnp(self) -> BNP | None:
        """Return the BNP during a fit, else None."""
        return self._attached

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Precondition; the step itself then leaves the gradients as clipping made them."""
        assert self.bnp is not None
        self.bnp.precondition_()

    def _remove(self, pl_module: LightningModule) -> None:
        if self.bnp is not None:
            self._ended = self.bnp.state_dict()
        super()._remove(pl_module)
        vars(pl_module).pop("clip_gradients", None)


class BatchlessCallback(MethodCallback):
    """Trains mu and sigma of a module's batchless layers; convert and initialize it before the fit.

    The likelihood's gradient never lies in ``.grad``: clipping and loss scaling do not see it.

    Args:
        rate: Rate of mu and sigma, see [`normkit.attach`][].
    """

    def __init__(self, rate: float = RATE) -> None:
        super().__init__(partial(attach_behind_scheduler, rate=rate))


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
        """Keep the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Keep the loss, without Lightning's division for accumulation."""
        self._loss = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure between backward and the step."""
        assert self.monitor is not None
        self.monitor.observe(self._batch, self._loss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the records that are not written yet."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


# -- a task of a module and its data -------------------------------------------------------------------------------------


class _Log:
    """Stands for the logger of a module that no Trainer drives: averages what one epoch logs under a name.

    Args:
        name: What to look for.
    """

    def __init__(self, name: str) -> None:
        self.name, self.names = name, set[str]()
        self._total, self._weight, self._metric = 0.0, 0.0, None
        self.samples = 1

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """What ``LightningModule.log`` is called with."""
        self.names.add(name)
        if name != self.name:
            return
        if hasattr(value, "compute"):  # a metric of torchmetrics, which keeps the whole epoch
            self._metric = value
            return
        weight = batch_size or self.samples
        self._total, self._weight = self._total + weight * float(value), self._weight + weight

    def log_dict(self, values: Any, *args: Any, **options: Any) -> None:
        """What ``LightningModule.log_dict`` is called with."""
        for name, value in values.items():
            self.log(name, value, *args, **options)

    def value(self) -> float:
        """The epoch's value.

        Raises:
            ValueError: Nothing was logged under the name.
        """
        if self._metric is not None:
            value = float(self._metric.compute())
            self._metric.reset()
            return value
        if not self._weight:
            logged = ", ".join(sorted(self.names)) or "nothing"
            raise ValueError(f"validation_step did not log {self.name!r} (it logged {logged}); give task(monitor=...)")
        return self._total / self._weight


@contextmanager
def _logging_to(module: LightningModule, log: _Log) -> Generator[None, None, None]:
    module.__dict__.update(log=log.log, log_dict=log.log_dict)
    try:
        yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]


def _training_loss(module: Any, batch: Any) -> Tensor:
    with _logging_to(module, _Log("")):
        step = module.training_step(batch, 0)
    return step["loss"] if isinstance(step, Mapping) else step


@dataclass(frozen=True)
class _Validation:
    """The score of a split: what ``validation_step`` logs as ``monitor``, over the epoch."""

    monitor: str

    def __call__(self, module: Any, batches: Iterable[Any]) -> float:
        log = _Log(self.monitor)
        with _logging_to(module, log):
            module.on_validation_epoch_start()
            for index, batch in enumerate(batches):
                log.samples = next((len(leaf) for leaf in tensors(batch) if leaf.dim()), 1)
                module.validation_step(batch, index)
            log.samples = 1
            module.on_validation_epoch_end()
        return log.value()


def task(
    module: Callable[[], LightningModule],
    datamodule: LightningDataModule,
    monitor: str,
    *,
    mode: Literal["max", "min"] = "max",
    unit: str = "",
    name: str | None = None,
) -> Task:
    """Make a task from a module and its data: ``training_step`` gives the loss, and what ``validation_step`` logs the score.

    The optimizers and schedules of ``configure_optimizers`` are not used: a study compares methods with their own.

    Args:
        module: The class, or a function that builds a module.
        datamodule: Its data; the datasets and the ``collate_fn`` of its loaders are used. The test split is scored by
            ``validation_step`` as well.
        monitor: Name of the score.
        mode: Whether a higher (``max``) or a lower (``min``) score is better.
        unit: Unit of the score; with ``%`` it is a fraction that is shown in percent.
        name: Name of the task in the report; default the name of the module.

    Returns:
        The task.

    Raises:
        ValueError: The module is no function, or optimizes by hand; the data has no map-style dataset.
    """
    if isinstance(module, LightningModule):
        kind = type(module).__name__
        raise ValueError(
            f"lightning.task: module is a {kind} that exists already; give the class, or lambda: {kind}(...)"
        )
    if not module().automatic_optimization:
        raise ValueError("lightning.task: the module optimizes by hand, which a study cannot; give a Task of its loss")
    logger.info("the optimizer of configure_optimizers is not used: a study compares methods with their own")
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.setup("test")
    loaders = [_loader(datamodule, split) for split in ("train", "val", "test")]
    return Task(
        name or getattr(module, "__name__", "module"),
        model=module,
        train=loaders[0].dataset,
        test=loaders[2].dataset,
        loss=_training_loss,
        score=_Validation(monitor),
        validation=loaders[1].dataset,
        metric=monitor.removeprefix("val_"),
        unit=unit,
        higher_is_better=mode == "max",
        collate=loaders[0].collate_fn,
    )


def _loader(datamodule: LightningDataModule, split: str) -> Any:
    loader: Any = getattr(datamodule, f"{split}_dataloader")()
    if not hasattr(getattr(loader, "dataset", None), "__getitem__"):
        raise ValueError(f"lightning.task: {split}_dataloader gives no loader of one map-style dataset; give a Task")
    return loader
