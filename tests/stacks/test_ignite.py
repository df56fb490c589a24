"""PyTorch-Ignite's trainer."""

import pytest
from torch import nn

import normkit
from tests.stacks.common import assert_same, batches, by_hand, network

engine = pytest.importorskip("ignite.engine", reason="needs pytorch-ignite, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["bnp", "batchless", "sgd-g", "revisited"])
def test_the_trainer_trains_as_the_loop_written_out(name):
    model, optimizer = normkit.apply(name, network(), lr=0.05)
    engine.create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss()).run(batches(), max_epochs=2)
    other = normkit.apply(name, network(), lr=0.05)
    by_hand(*other, batches() * 2)
    assert_same(model, other[0])
