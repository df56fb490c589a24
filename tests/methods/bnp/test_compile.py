"""BNP under torch.compile: the same statistics, without a break in the graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from normkit import BNP

# torch's own tracer of autograd functions makes an instance of them
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    ).double()


def train(network, forward, micro=None, probe=False):
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    bnp = BNP(network)
    bnp.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = 1 + torch.randn(6, 2, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        if probe:
            with torch.no_grad():
                forward(x * 9)
            network.eval()
            forward(x * 8).sum().backward()
            network.train()
            network.zero_grad()
        for part, target in zip(x.split(micro or 6), y.split(micro or 6), strict=True):
            (F.cross_entropy(forward(part), target) * len(part) / 6).backward()
        optimizer.step()
    return network, bnp


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_the_plain_one_without_graph_breaks(backend):
    plain, expected = train(*([network := model()] * 2))
    network = model()
    compiled, bnp = train(network, torch.compile(network, backend=backend, fullgraph=True))
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    for path, entry in expected.state_dict().items():
        for name, value in entry.items():
            assert torch.allclose(bnp.state_dict()[path][name], value, rtol=1e-10)


def test_compiled_micro_batches_and_forwards_that_do_not_train_count_as_in_eager_mode():
    plain, _ = train(*([network := model()] * 2))
    network = model()
    compiled, _ = train(network, torch.compile(network, backend="aot_eager"), micro=2, probe=True)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_compiled_eval_graph_is_the_plain_one():
    nodes = []

    def backend(graph, _):
        nodes.append([node.op for node in graph.graph.nodes])
        return graph.forward

    for observed in (False, True):
        network = model().eval()
        if observed:
            BNP(network)
        torch.compiler.reset()
        torch.compile(network, backend=backend, fullgraph=True)(torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert nodes[0] == nodes[1]


def test_a_model_moved_between_observing_and_attaching_compiles_in_one_graph():
    network = model()
    with torch.device("meta"):
        moved = copy.deepcopy(network).to("meta")
    bnp = BNP(moved)
    moved.to_empty(device="cpu").load_state_dict(network.state_dict())
    optimizer = SGD(moved.parameters(), lr=0.1)
    bnp.attach(optimizer)
    compiled = torch.compile(moved, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    for step in range(1, 4):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        assert all(entry["steps"] == step for entry in bnp.state_dict().values())


def test_taps_are_counted_in_compiled_graphs_as_in_eager_mode_at_any_length_and_under_masks():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, padding=2, padding_mode="reflect"),
        nn.Conv1d(3, 4, 1),
        nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1),
        nn.Conv1d(2, 2, 3, padding="same", dilation=2),
    ).double()
    network = copy.deepcopy(plain)
    forwards = {plain: plain, network: torch.compile(network, backend="aot_eager", fullgraph=True)}
    bnps = {module: BNP(module) for module in forwards}
    for length in (9, 11, 14):
        x = 1 + torch.randn(3, 2, length, dtype=torch.float64)
        mask = torch.arange(length) < torch.tensor([length, length - 2, length - 3])[:, None]
        for module, bnp in bnps.items():
            module.zero_grad()
            with bnp.masked(mask):
                forwards[module](x).square().mean().backward()
            bnp.precondition_()
            bnp.discard()
    for path, entry in bnps[plain].state_dict().items():
        for name, value in entry.items():
            assert torch.allclose(bnps[network].state_dict()[path][name], value, rtol=1e-12, atol=1e-14)
