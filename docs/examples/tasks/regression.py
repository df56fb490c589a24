"""Regression on real data: the progression of diabetes a year after ten measurements (RMSE, lower is better).

normkit compare --task docs/examples/tasks/regression.py:task --methods none,batch,bnp --batch-sizes 32,4
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

import normkit


def model() -> nn.Module:
    """Two hidden layers with batch normalization."""
    layers: list[nn.Module] = []
    for inputs in (10, 32):
        layers += [nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 1))


def task() -> normkit.Task:
    """442 patients: 100 test, the others train; the target is standardized by the training samples."""
    inputs, target = (torch.as_tensor(values).float() for values in load_diabetes(return_X_y=True))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[100:], order[:100]
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    target = ((target - target[train].mean()) / target[train].std())[:, None]
    splits = (TensorDataset(inputs[rows], target[rows]) for rows in (train, test))
    return normkit.Task.regression("diabetes", model, *splits, unit="sd")
