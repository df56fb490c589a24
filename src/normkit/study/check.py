"""Checks before the first run of a study: data, model, loss, score and device are tried once."""

import logging
import warnings
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import SGD
from torch.utils.data import default_collate

import normkit
from normkit.inspection.forward import without_dropout
from normkit.study.classification import NamedClassification, check_augmentation, check_classes, check_fit
from normkit.study.config import StudyConfig
from normkit.study.data.samples import Fetcher, Request, fetched
from normkit.study.data.sampling import seed_all
from normkit.study.data.structure import to_device
from normkit.study.environment import check_device
from normkit.study.errors import StudyError
from normkit.study.load import load, with_validation
from normkit.study.methods import parse_method
from normkit.study.plan import validate
from normkit.study.task import Task, length

logger = logging.getLogger(__name__)

NO_LOSS = 1e-6  # of which no ratio is taken
SUMMED = 0.02  # a loss that sums over the samples doubles to within this share


def check(config: StudyConfig, task: Task | None = None) -> Task:
    """Load the task and try it once, so that a mistake ends the study before it begins.

    Args:
        config: The study.
        task: Its task, if it is in memory.

    Returns:
        The task, with a validation split.

    Raises:
        StudyError: The task cannot be used as given.
    """
    validate(config)
    check_device(config.device)
    try:
        task = load(config) if task is None else with_validation(task, config)
    except StudyError:
        raise
    except ValueError as error:
        raise StudyError(f"--data: {error}") from error
    for size in config.batch_sizes:
        if size > length(task.train):
            raise StudyError(
                f"--batch-sizes: {size} is larger than the training split of {length(task.train)} examples; give less"
            )
    if isinstance(task, NamedClassification):
        check_classes(task)
    seed_all(0)
    model = build(task, config.device)
    if isinstance(task, NamedClassification) and config.augmentation:
        check_augmentation(task, config.augmentation)
    check_task(task, model, config.device)
    alike = same_networks(config.methods, model)
    if alike:
        raise StudyError(
            f"--methods: {', '.join(alike)} would all train {task.model_label} as it is, since it has no batch normalization "
            "that they could exchange; give a model with batch normalization, or keep one of them"
        )
    check_fresh(task, model, config.device)
    check_training(task, model, config.device)
    return task


def build(task: Task, device: str) -> nn.Module:
    """Build a fresh model of the task on a device.

    Raises:
        StudyError: It cannot be built.
    """
    try:
        model = task.model()
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        label = "--model" if isinstance(task, NamedClassification) else task.model_label
        raise StudyError(f"{label}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise StudyError(
            f"{task.model_label}: is a {type(model).__name__}; Task(model=...) is called and returns a module"
        )
    try:
        return model.to(device)
    except (RuntimeError, NotImplementedError) as error:  # on the meta device, or too large
        raise StudyError(
            f"{task.model_label}: cannot be put on {device} ({str(error).splitlines()[0]}); give a model with values that fits"
        ) from error


def check_fresh(task: Task, model: nn.Module, device: str) -> None:
    """Check that a second model has its own weights, equal to the first's under the same seed.

    Args:
        task: The task.
        model: A model that was built after ``seed_all(0)``.
        device: Where it is.

    Raises:
        StudyError: It has none that are trained, shares them, or draws them from a generator that is not seeded.
    """
    weights = {id(p) for p in model.parameters() if p.requires_grad}
    if not weights:
        raise StudyError(f"{task.model_label}: has no weights that are trained; give a model with some")
    seed_all(0)
    again = build(task, device)
    if weights & {id(p) for p in again.parameters()}:
        raise StudyError(
            f"{task.model_label}: the factory returned the same weights twice, which the trials would train on and on; "
            "it must build a new model with every call"
        )
    if not _equal_weights(model.state_dict(), again.state_dict()):
        raise StudyError(
            f"{task.model_label}: changes when it is built twice with one seed, so methods would not start from the same "
            "weights; draw them from the global generators of torch, NumPy or Python"
        )


def _equal_weights(first: dict[str, Any], second: dict[str, Any]) -> bool:
    known = [name for name, value in first.items() if isinstance(value, Tensor) and not is_lazy(value)]
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in known
    )


def check_task(task: Task, model: nn.Module, device: str) -> None:
    """Try the task on a few samples.

    Args:
        task: The task.
        model: Its model, left as it was.
        device: Where the model is.
    """
    if isinstance(task, NamedClassification):
        check_fit(task, model, device)
        return
    for split in ("train", "validation", "test"):
        _check_samples(task, split)
    model = deepcopy(model)
    _check_loss(task, model, device)
    if task.validation is not None:
        _check_score(task, model, device)


def check_training(task: Task, model: nn.Module, device: str) -> None:
    """Try one backward pass in train mode on two samples: a model may work in eval mode alone.

    Args:
        task: The task.
        model: Its model; a copy of it is tried.
        device: Where the model is.

    Raises:
        StudyError: It cannot be trained.
    """
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its trials show them
            task.training_loss(deepcopy(model).train(), task.first_batch(2, device)).backward()
    except (Exception, SystemExit) as error:
        raise StudyError(
            f"{task.model_label}: cannot be trained on {task.data_label} ({type(error).__name__}: {error}); its forward or "
            "backward fails in train mode"
        ) from error


def _check_samples(task: Task, split: str) -> None:
    # Fetch the first samples and the last one, so that what raises or does not collate is named at once.
    dataset = getattr(task, split)
    if dataset is None:
        return
    try:
        total = length(dataset)
    except StudyError as error:
        raise StudyError(f"{task.data_label}: {split}: {error}") from error
    if total == 0:
        raise StudyError(f"{task.data_label}: {split} has no samples; give some")
    fetcher = Fetcher(dataset, split, collate=task.collate)
    list(fetched(fetcher, iter([Request(0, (tuple(range(min(2, total))), (total - 1,)))])))


def _check_loss(task: Task, model: nn.Module, device: str) -> None:
    fetcher = Fetcher(task.train, "train", collate=list)
    (((samples, _),),) = fetched(fetcher, iter([Request(0, (tuple(range(min(2, length(task.train)))),))]))
    model.train()
    try:
        batches = [to_device((task.collate or default_collate)(samples * times), device) for times in (1, 2)]
        with without_dropout(model):
            loss, doubled = (task.training_loss(model, batch) for batch in batches)
    except Exception as error:
        raise StudyError(f"{task.data_label}: the loss raised {type(error).__name__}: {error}") from error
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise StudyError(f"{task.data_label}: the loss is {found}; return one scalar, the mean over the batch")
    if not loss.requires_grad:
        raise StudyError(
            f"{task.data_label}: the loss has no gradient; compute it from the model's output, without detach or item"
        )
    once, twice = float(loss.detach()), float(doubled.detach())
    if abs(once) > NO_LOSS and abs(twice / once - 2) < SUMMED:
        logger.warning(
            "%s: the loss doubles with a batch of twice the samples, so it seems to sum over them; return their mean, or "
            "learning rates will not be comparable between batch sizes",
            task.data_label,
        )


@torch.no_grad()
def _check_score(task: Task, model: nn.Module, device: str) -> None:
    # Score a few samples, and the whole split where a few are not enough: a score may need every class, say.
    model.eval()
    try:
        task.evaluate(model, [next(task.evaluation_batches("validation", device=device, most=2))])
    except StudyError as error:
        raise StudyError(f"{task.data_label}: {error}") from error
    except Exception:
        try:
            task.evaluate(model, task.evaluation_batches("validation", device=device, most=2))
        except Exception as error:
            raise StudyError(f"{task.data_label}: the score raised {type(error).__name__}: {error}") from error


def same_networks(methods: Iterable[str], model: nn.Module) -> list[str]:
    """Return the methods that train ``model`` unchanged with plain SGD, if there are two or more, else none.

    In a model with batch normalization only the recipe ``batch`` does so.

    Args:
        methods: Methods of a study.
        model: A model; not changed.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> same_networks(["none", "batch", "group", "bnp"], net), same_networks(["none", "bnp"], net)
        (['none', 'batch', 'group'], [])
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return []
    found = [method for method in methods if _leaves_unchanged(method, model)]
    return found if len(found) > 1 else []


def _leaves_unchanged(method: str, model: nn.Module) -> bool:
    name, options = parse_method(method)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is nothing to exchange is what is asked here
            applied, optimizer = normkit.apply(name, deepcopy(model), lr=0.1, options=options)
    except Exception:  # it cannot run, which its trials will tell
        return False
    hooked = bool(optimizer._optimizer_step_pre_hooks)  # a method that works on gradients
    one_group = len(optimizer.param_groups) == 1  # others have learning rates or decays of their own
    return type(optimizer) is SGD and one_group and not hooked and repr(applied) == repr(model)
