"""skorch: estimators that are pickled and cloned."""

import pickle

import numpy as np
import pytest
import torch

import normkit
from tests.stacks.common import assert_same, batches, network

skorch = pytest.importorskip("skorch", reason="needs skorch, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Apply(skorch.callbacks.Callback):
    """Applies a method before the first epoch."""

    def __init__(self, name):
        self.name = name

    def on_train_begin(self, net, **_):
        if not hasattr(net, "applied_"):
            net.applied_ = True
            net.module_, net.optimizer_ = normkit.apply(self.name, net.module_, lr=0.05)


@pytest.mark.parametrize("name", ["bnp", "batchless", "sgd-g", "group+ws"])
def test_a_pickled_estimator_trains_on_as_the_original(name):
    x, y = (torch.cat(part).numpy() for part in zip(*batches(), strict=True))
    net = skorch.NeuralNetClassifier(
        network(), criterion=torch.nn.CrossEntropyLoss, train_split=None, verbose=0, callbacks=[Apply(name)]
    )
    net.fit(x, y, epochs=2)
    twin = pickle.loads(pickle.dumps(net))
    net.partial_fit(x, y)
    twin.partial_fit(x, y)
    assert_same(net.module_, twin.module_)
    assert np.isfinite(net.predict_proba(x)).all()
    assert (
        normkit.describe(net.module_, net.optimizer_).summary == normkit.describe(twin.module_, twin.optimizer_).summary
    )
