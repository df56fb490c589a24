"""What the report says of time and memory was measured on the step that the study trains."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from normkit.study.config import StudyConfig
from normkit.study.data.samples import MicroBatch
from normkit.study.load import load
from normkit.study.task import classification_loss
from normkit.study.train import cost
from normkit.study.train.cost import measure_costs, saved_bytes
from normkit.study.train.loop import LossOf

CONFIG = StudyConfig(model="digits-cnn", methods=("batch", "none"), batch_sizes=(32,), budget=64, limit=100, lr=0.1)


@pytest.fixture(scope="module")
def task():
    return load(CONFIG)


def memory(config, task):
    return {cost.method: cost.memory_bytes for cost in measure_costs(config, task)}


def test_bytes_saved_for_backward_are_those_of_the_layers_outputs():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    inputs, labels = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    network = LossOf(model, classification_loss)
    hidden, log_probabilities, total_weight = 4 * 7 * 4, 4 * 3 * 4, 4  # of the ReLU, and of the cross-entropy
    assert saved_bytes(network, MicroBatch((inputs, labels), 4)) == hidden + log_probabilities + total_weight


def test_costs_are_relative_to_the_reference(task):
    batch, none = measure_costs(CONFIG, task)
    assert (batch.step_ratio, batch.memory_ratio) == (1.0, 1.0)
    assert none.memory_ratio == none.memory_bytes / batch.memory_bytes
    assert none.step_ratio_low <= none.step_ratio <= none.step_ratio_high


def test_memory_is_that_of_the_precision_that_is_trained(task):
    full, half = memory(CONFIG, task), memory(replace(CONFIG, amp=True), task)
    assert half["none"] < 0.85 * full["none"]  # activations are half as large; copies of the weights are added


def test_memory_is_that_of_a_micro_batch(task):
    whole, pieces = memory(CONFIG, task), memory(replace(CONFIG, micro_batch=8), task)
    assert pieces["batch"] < 0.3 * whole["batch"]


def test_a_method_that_fails_in_a_step_has_the_reason_and_the_others_their_costs(task, monkeypatch):
    real = cost.build_trial

    def building(config, key, given):
        model, optimizer = real(config, key, given)
        if key.method == "none":
            next(model.parameters()).register_hook(lambda gradient: 1 / 0)
        return model, optimizer

    monkeypatch.setattr(cost, "build_trial", building)
    batch, none = measure_costs(CONFIG, task)
    assert none.error == "ZeroDivisionError: division by zero"
    assert batch.step_seconds > 0


def test_a_method_that_cannot_run_has_the_reason_in_place_of_its_cost():
    config = StudyConfig(data="spiral", model="mlp", methods=("batch", "none"), batch_sizes=(1,), budget=8, lr=0.1)
    batch, none = measure_costs(config, load(config))
    assert "more than 1 value per channel" in batch.error
    assert none.step_seconds > 0
    assert none.step_ratio is None
