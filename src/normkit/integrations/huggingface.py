"""Use normkit with Hugging Face's ``Trainer``: callbacks for methods and the Monitor, and a task made from a Trainer.

The Trainer clips before it calls anyone, so the BNP callback takes clipping over: it preconditions first and then clips to
the same ``max_grad_norm``. fp16 is refused, because its gradients are still scaled at that point; bf16 works.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.instruments import Monitor
from normkit.methods.batchless.training import RATE, attach_behind_scheduler
from normkit.methods.bnp.bnp import BNP
from normkit.study.data.structure import to_device
from normkit.study.task import Task

try:
    from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_pt_utils import nested_concat, nested_numpify
except ImportError as missing:
    raise ImportError(f"{missing}; these callbacks need an extra: pip install 'normkit[transformers]'") from missing

STATISTICS = "bnp.pt"
logger = logging.getLogger(__name__)


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper: only its hooks run with the step."""
    return getattr(optimizer, "optimizer", optimizer)


class MethodCallback(TrainerCallback):
    """Attaches a method to the Trainer's optimizer for the length of a training.

    Args:
        attach: ``attach(model, optimizer)``, which returns something with a ``remove()``.

    Examples:
        >>> trainer = Trainer(model, arguments, callbacks=[MethodCallback(normkit.attach)])  # doctest: +SKIP
    """

    def __init__(self, attach: Callable[[nn.Module, Optimizer], Any]) -> None:
        self._attach = attach
        self._attached: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the Trainer's optimizer."""
        self.on_train_end(args, state, control)  # a training that was interrupted did not come to it
        self._attached = self._attach(kwargs["model"], _unwrapped(kwargs["optimizer"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the model."""
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


class BNPCallback(MethodCallback):
    """Preconditions gradients by batch normalization preconditioning, then clips them to the Trainer's ``max_grad_norm``.

    Running statistics are kept beside each checkpoint (``bnp.pt``) and read again when training resumes from it.

    Args:
        options: Options of [`normkit.BNP`][].

    Attributes:
        bnp: The BNP during a training, else None.

    Examples:
        >>> trainer = Trainer(model, arguments, callbacks=[BNPCallback()])  # doctest: +SKIP
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(self._attach_bnp)
        self.options = options
        self.max_grad_norm = 0.0

    def _attach_bnp(self, model: nn.Module, optimizer: Optimizer) -> BNP:
        bnp = BNP(model, **self.options)
        bnp.attach(optimizer)
        return bnp

    @property
    def bnp(self) -> BNP | None:
        """Return the BNP during a training, else None."""
        return self._attached

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the Trainer's optimizer and take over clipping.

        Raises:
            ValueError: The Trainer trains in fp16.
        """
        if args.fp16:
            raise ValueError(
                "BNPCallback: fp16=True leaves gradients scaled where they are preconditioned; use bf16=True"
            )
        super().on_train_begin(args, state, control, **kwargs)
        assert self.bnp is not None
        self.max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        if state.global_step:
            given = args.resume_from_checkpoint  # a path where it was given with the arguments, not with train()
            folder = Path(given) if isinstance(given, str) and Path(given).is_dir() else _checkpoint(args, state)
            if (kept := folder / STATISTICS).exists():
                self.bnp.load_state_dict(torch.load(kept, weights_only=True))
            else:
                logger.warning(
                    "BNPCallback: training resumes at step %d, but there is no %s, so the running statistics start anew; copy "
                    "it there from the checkpoint, or give TrainingArguments(resume_from_checkpoint=...)",
                    state.global_step,
                    kept,
                )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Precondition, then clip."""
        assert self.bnp is not None
        self.bnp.precondition_()
        if self.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(kwargs["model"].parameters(), self.max_grad_norm)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the running statistics beside the checkpoint."""
        assert self.bnp is not None
        if state.is_world_process_zero:
            torch.save(self.bnp.state_dict(), _checkpoint(args, state) / STATISTICS)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the model and return clipping to the Trainer."""
        if self.bnp is not None:
            args.max_grad_norm = self.max_grad_norm
        super().on_train_end(args, state, control)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


class BatchlessCallback(MethodCallback):
    """Trains mu and sigma of a model's batchless layers; convert and initialize it before building the Trainer.

    Args:
        rate: Rate of mu and sigma, see [`normkit.attach`][].
    """

    def __init__(self, rate: float = RATE) -> None:
        super().__init__(partial(attach_behind_scheduler, rate=rate))


class MonitorCallback(TrainerCallback):
    """Watches training with [`normkit.instruments.Monitor`][], on the batches and losses of the training itself.

    Args:
        objective: ``loss = objective(model, inputs)`` for the keyword arguments of the model's forward; default the loss
            that the model returns.
        options: Options of the Monitor: ``every``, ``path``, ``tensorboard`` ...

    Attributes:
        monitor: The Monitor; its ``history`` stays readable after training.
    """

    def __init__(self, objective: Callable[[nn.Module, Any], Tensor] | None = None, **options: Any) -> None:
        self.objective, self.options = objective or _own_loss, options
        self.monitor: Monitor | None = None
        self._inputs: dict[str, Any] | None = None
        self._loss: Tensor | None = None
        self._hook: Any = None
        self._looking = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start watching; a hook on the model records the batches, which the Trainer does not pass to callbacks."""
        self.on_train_end(args, state, control)  # a training that was interrupted did not come to it
        model = kwargs["model"]
        self.monitor = Monitor(model, self.objective, _unwrapped(kwargs["optimizer"]), **self.options)
        self._hook = model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, model: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> None:
        if model.training and not self._looking and getattr(output, "loss", None) is not None:
            self._inputs, self._loss = inputs, output.loss.detach()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure between backward and the step."""
        assert self.monitor is not None
        if self._inputs is not None and self._loss is not None:
            self._looking = True
            try:
                self.monitor.observe(self._inputs, self._loss)
            finally:
                self._looking = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the records that are not written yet."""
        if self.monitor is not None:
            self.monitor.close()
            self._hook.remove()


def _own_loss(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs).loss


# -- a task of what a Trainer was made of --------------------------------------------------------------------------------


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch)["loss"]


@dataclass(frozen=True)
class _Score:
    """One entry of what ``compute_metrics`` makes of the predictions for a split."""

    compute: Callable[[EvalPrediction], Mapping[str, float]]
    labels: tuple[str, ...]
    metric: str

    def __call__(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        found: Any = None
        for batch in batches:
            outputs = {key: value for key, value in model(**batch).items() if key != "loss"}
            logits, labels = (self._one(part) for part in (outputs, {name: batch[name] for name in self.labels}))
            part = to_device((logits, labels), "cpu")
            found = part if found is None else nested_concat(found, part, padding_index=-100)
        metrics = self.compute(EvalPrediction(*nested_numpify(found)))
        if self.metric not in metrics:
            raise ValueError(f"compute_metrics gives {', '.join(metrics)}, not {self.metric!r}; give task(metric=...)")
        return float(metrics[self.metric])

    @staticmethod
    def _one(values: Mapping[str, Any]) -> Any:
        return next(iter(values.values())) if len(values) == 1 else tuple(values.values())


@dataclass(frozen=True)
class _Collate:
    """The Trainer's collator on the columns that the model takes."""

    collator: Callable[[list[Any]], Any]
    columns: frozenset[str]

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        return dict(self.collator([{k: v for k, v in sample.items() if k in self.columns} for sample in samples]))


def task(
    trainer: Trainer,
    test: Any,
    metric: str,
    *,
    unit: str = "",
    higher_is_better: bool = True,
    name: str | None = None,
) -> Task:
    """Make a task from a Trainer's model, datasets, collator and ``compute_metrics``; its optimizer and schedule are not used.

    With ``Trainer(model_init=...)`` each seed draws its own weights; otherwise every trial starts from a copy of the Trainer's
    model as it is now.

    Args:
        trainer: The Trainer; its ``eval_dataset`` validates.
        test: Dataset for the final runs.
        metric: The entry of ``compute_metrics`` that methods are compared by.
        unit: Unit of the score; with ``%`` it is a fraction that is shown in percent.
        higher_is_better: Whether a higher score is a better one.
        name: Name of the task in the report; default the class of the model.

    Returns:
        The task.

    Raises:
        ValueError: The Trainer has no ``compute_metrics``, or no training data.
    """
    if trainer.compute_metrics is None or trainer.train_dataset is None:
        raise ValueError(
            "huggingface.task: the Trainer needs train_dataset and compute_metrics, which give loss and score"
        )
    logger.info("the Trainer's optimizer is not used: a study compares methods with their own")
    model: Any = trainer.model
    columns = frozenset((*inspect.signature(model.forward).parameters, *trainer.label_names, "label", "label_ids"))
    start = deepcopy(model).cpu()
    train: Any = trainer.train_dataset
    validation: Any = trainer.eval_dataset
    labels = tuple(trainer.label_names)
    return Task(
        name or type(model).__name__,
        model=trainer.model_init or (lambda: deepcopy(start)),
        train=train,
        test=test,
        loss=_loss,
        score=_Score(trainer.compute_metrics, labels, metric),
        validation=validation,
        metric=metric,
        unit=unit,
        higher_is_better=higher_is_better,
        collate=_Collate(trainer.data_collator, columns),
        inputs=lambda batch: {key: value for key, value in batch.items() if key not in labels},
    )
