"""Checks before the first run of a study: data, model and device are tried once."""

import warnings
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

import normkit
from normkit.study.classification import NamedClassification, check_classes, check_fit
from normkit.study.config import StudyConfig
from normkit.study.environment import check_device
from normkit.study.errors import StudyError
from normkit.study.load import load
from normkit.study.methods import parse_method
from normkit.study.plan import validate
from normkit.study.task import Task, length


def check(config: StudyConfig) -> Task:
    """Load the task and try it once, so that a mistake ends the study before it begins.

    Raises:
        StudyError: The task cannot be used as given.
    """
    validate(config)
    check_device(config.device)
    try:
        task = load(config)
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
    model = build(task, config.device)
    if config.augmentation:
        _check_augmentation(config, task)
    check_task(task, model, config.device)
    alike = same_networks(config.methods, model)
    if alike:
        raise StudyError(
            f"--methods: {', '.join(alike)} would all train {task.model_label} as it is, since it has no batch normalization "
            "that they could exchange; give a model with batch normalization, or keep one of them"
        )
    weights = {id(p) for p in model.parameters() if p.requires_grad}
    if not weights:
        raise StudyError(f"{task.model_label}: has no weights that are trained; give a model with some")
    if weights & {id(p) for p in build(task, config.device).parameters()}:
        raise StudyError(
            f"{task.model_label}: the factory returned the same weights twice, which the trials would train on and on; "
            "it must build a new model with every call"
        )
    check_training(task, model, config.device)
    return task


def build(task: Task, device: str) -> nn.Module:
    """A fresh model of the task on a device.

    Raises:
        StudyError: It cannot be built.
    """
    try:
        return task.model().to(device)
    except ValueError as error:
        raise StudyError(f"--model: {error}") from error
    except (RuntimeError, NotImplementedError) as error:  # on the meta device, or too large
        raise StudyError(
            f"{task.model_label}: cannot be put on {device} ({str(error).splitlines()[0]}); give a model with values that fits"
        ) from error


def check_task(task: Task, model: nn.Module, device: str) -> None:
    """Try the task on a few samples.

    Args:
        task: The task.
        model: Its model, left as it was.
        device: Where the model is.
    """
    if isinstance(task, NamedClassification):
        check_fit(task, model, device)


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


def _check_augmentation(config: StudyConfig, task: Task) -> None:
    shape = task.data.input_shape if isinstance(task, NamedClassification) else ()
    if len(shape) != 3 or config.crop >= min(shape[1:]):
        raise StudyError(
            f"--flip, --crop: {task.data_label} has inputs of shape {shape}; they need images larger than the crop"
        )


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
