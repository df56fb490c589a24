"""Checks before the first run of a study: data, model and device are tried once."""

import warnings
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

import normkit
from normkit.study.config import StudyConfig
from normkit.study.data.dataset import Data
from normkit.study.environment import check_device
from normkit.study.errors import StudyError
from normkit.study.factory import is_factory
from normkit.study.models import build_model
from normkit.study.plan import validate
from normkit.study.train.trial import load

MOST_CLASSES = 100  # per training example: what has more is no class number


def check(config: StudyConfig) -> Data:
    """Load the data and try the model on it, so that a mistake ends the study before it begins.

    Raises:
        StudyError: Data or model cannot be used as given.
    """
    validate(config)
    check_device(config.device)
    try:
        data = load(config)
    except StudyError:
        raise
    except ValueError as error:
        raise StudyError(f"--data: {error}") from error
    for size in config.batch_sizes:
        if size > len(data.train):
            raise StudyError(
                f"--batch-sizes: {size} is larger than the training split of {len(data.train)} examples; give less"
            )
    _check_classes(config, data)
    model = _built(config, data)
    if config.augmentation and (len(data.input_shape) != 3 or config.crop >= min(data.input_shape[1:])):
        raise StudyError(
            f"--flip, --crop: --data {config.data} has inputs of shape {data.input_shape}; they need images "
            "larger than the crop"
        )
    check_fit(config.model, model, data, config.device)
    alike = same_networks(config.methods, model)
    if alike:
        raise StudyError(
            f"--methods: {', '.join(alike)} would all train --model {config.model} as it is, since it has no batch normalization "
            "that they could exchange; give a model with batch normalization, or keep one of them"
        )
    weights = {id(p) for p in model.parameters() if p.requires_grad}
    if not weights:
        raise StudyError(f"--model {config.model}: has no weights that are trained; give a model with some")
    if is_factory(config.model) and weights & {id(p) for p in _built(config, data).parameters()}:
        raise StudyError(
            f"--model {config.model}: the factory returned the same weights twice, which the trials would train on and on; "
            "it must build a new model with every call"
        )
    return data


def same_networks(methods: Iterable[str], model: nn.Module) -> list[str]:
    """Return the methods that train ``model`` unchanged with plain SGD, if there are two or more, else none.

    In a model with batch normalization only the recipe ``batch`` does so.

    Args:
        methods: Names of recipes.
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is nothing to exchange is what is asked here
            applied, optimizer = normkit.apply(method, deepcopy(model), lr=0.1)
    except Exception:  # it cannot run, which its trials will tell
        return False
    hooked = bool(optimizer._optimizer_step_pre_hooks)  # a method that works on gradients
    one_group = len(optimizer.param_groups) == 1  # others have learning rates or decays of their own
    return type(optimizer) is SGD and one_group and not hooked and repr(applied) == repr(model)


def check_fit(name: str, model: nn.Module, data: Data, device: str) -> None:
    """Try a model on two examples.

    Args:
        name: What the user called it.
        model: The model, left as it was.
        data: The data.
        device: Where the model is.

    Raises:
        StudyError: It cannot take them, or does not give logits of their classes.
    """
    sample = data.normalise(data.train.examples(slice(2))[0].to(device))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(sample)
        model.train(was_training)
    except Exception as error:
        raise StudyError(
            f"--model {name}: cannot take inputs of shape {tuple(sample.shape)} from --data {data.name} "
            f"({type(error).__name__}: {error}); give a model that fits the data"
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape != (len(sample), data.classes):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise StudyError(
            f"--model {name}: its output is {found} where --data {data.name} with {data.classes} classes needs "
            f"{(len(sample), data.classes)}; build the model with `classes` outputs"
        )


def _check_classes(config: StudyConfig, data: Data) -> None:
    if len(data.train.labels.unique()) < 2:
        raise StudyError(f"--data {config.data}: all training examples are of one class; give examples of two or more")
    if data.classes > MOST_CLASSES * len(data.train):
        raise StudyError(
            f"--data {config.data}: its {len(data.train)} training examples have labels up to {data.classes - 1}; number the "
            "classes 0, 1, 2 ..."
        )


def _built(config: StudyConfig, data: Data) -> nn.Module:
    try:
        return build_model(config.model, input_shape=data.input_shape, classes=data.classes).to(config.device)
    except ValueError as error:
        raise StudyError(f"--model: {error}") from error
