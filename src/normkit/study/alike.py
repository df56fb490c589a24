"""Methods that are one and the same on a model: a study would train it several times under several names."""

import warnings
from collections.abc import Iterable
from copy import deepcopy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

import normkit


def same_networks(methods: Iterable[str], model: nn.Module) -> list[str]:
    """Those of ``methods`` that leave ``model`` as it is, to plain SGD, where they are two or more; else none.

    With batch normalization in it, only the recipe ``batch`` does.

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
    found = [method for method in methods if _leaves_as_it_is(method, model)]
    return found if len(found) > 1 else []


def _leaves_as_it_is(method: str, model: nn.Module) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is nothing to exchange is what is asked here
            applied, optimizer = normkit.apply(method, deepcopy(model), lr=0.1)
    except Exception:  # it cannot run, which its trials will tell
        return False
    hooked = bool(optimizer._optimizer_step_pre_hooks)  # a method that works on gradients
    one_group = len(optimizer.param_groups) == 1  # others have learning rates or decays of their own
    return type(optimizer) is SGD and one_group and not hooked and repr(applied) == repr(model)
