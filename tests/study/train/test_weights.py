import pytest
import torch
from torch import nn

from normkit.study.train.weights import WeightAverage


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def step(net, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape, generator=rng, dtype=p.dtype)
        net[1].running_mean += 1
        net[1].num_batches_tracked += 1


def test_the_average_is_the_recursion_written_out():
    net = model()
    average = WeightAverage(net, 0.5)
    expected = net[0].weight.detach().clone()
    for t in range(1, 30):
        step(net, t)
        average.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    with average.in_place():
        torch.testing.assert_close(net[0].weight, expected, rtol=1e-12, atol=1e-12)


def test_the_models_own_values_come_back_bit_for_bit_also_after_an_error():
    net = model()
    average = WeightAverage(net, 0.9)
    step(net, 1)
    average.update()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def fail():
        with average.in_place():
            assert not torch.equal(net[0].weight, before["0.weight"])
            assert not torch.equal(net[1].running_mean, before["1.running_mean"])
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        fail()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_average_goes_on_from_its_state():
    one, two = model(), model()
    a, b = WeightAverage(one, 0.9), WeightAverage(two, 0.9)
    for t in range(5):
        step(one, t)
        a.update()
    two.load_state_dict(one.state_dict())
    b.load_state_dict(a.state_dict())
    for net, average in ((one, a), (two, b)):
        step(net, 9)
        average.update()
    with a.in_place(), b.in_place():
        assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
