"""Hugging Face Accelerate: wrapped optimizers, accumulation, checkpoints."""

import pytest
import torch
from torch import nn

import normkit
from tests.stacks.common import assert_same, batches, by_hand, network

accelerate = pytest.importorskip("accelerate", reason="needs normkit[transformers]")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def train(accelerator, model, optimizer, data):
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["bnp", "batchless", "sgd-g", "adam-g", "revisited"])
def test_a_run_resumed_from_its_checkpoint_ends_as_the_uninterrupted_one(name, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*normkit.apply(name, network(), lr=0.05))
    train(accelerator, model, optimizer, batches()[:2])
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, batches()[2:])
    again = accelerate.Accelerator(cpu=True)
    resumed, its = again.prepare(*normkit.apply(name, network(), lr=0.05))
    again.load_state(tmp_path)
    train(again, resumed, its, batches()[2:])
    assert_same(model, resumed)
    whole = normkit.apply(name, network(), lr=0.05)
    by_hand(*whole, batches())
    assert_same(model, whole[0])


@pytest.mark.parametrize("name", ["bnp", "batchless"])
def test_accumulated_micro_batches_are_one_batch(name):
    ends = []
    for pieces in (1, 4):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=pieces)
        model, optimizer = normkit.apply(name, network().double(), lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        data = [part for x, y in batches() for part in zip(x.double().chunk(pieces), y.chunk(pieces), strict=True)]
        train(accelerator, model, optimizer, data)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
