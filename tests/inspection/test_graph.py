import pytest
import torch
from torch import nn

import normkit
from normkit.inspection.graph import dataflow, producers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + x)


class Branching(nn.Module):
    """Does not trace: the number of blocks depends on data."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks if x.sum() > 0 else ():
            x = block(x)
        return x


def test_a_norm_behind_a_convolution_has_it_as_producer_also_inside_residual_blocks():
    assert producers(Block()) == {"norm1": "conv1", "norm2": "conv2"}


def test_a_model_that_does_not_trace_is_traced_in_parts():
    assert producers(Branching()) == {f"blocks.{i}.norm{j}": f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)}


def test_what_data_parallel_wraps_is_traced_wherever_it_stands():
    assert producers(nn.DataParallel(Block())) == {"module.norm1": "module.conv1", "module.norm2": "module.conv2"}
    found = producers(nn.Sequential(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 1))), nn.BatchNorm2d(4)))
    assert found == {"1": "0.module.0"}
    parts = Branching()
    parts.blocks = nn.ModuleList([nn.DataParallel(Block())])
    assert producers(parts) == {f"blocks.0.module.norm{j}": f"blocks.0.module.conv{j}" for j in (1, 2)}


def test_residual_sums_appear_as_add_however_they_are_written():
    class Sum(nn.Module):
        def forward(self, x, y):
            z = x + y
            z += x
            z = torch.add(z, x)
            return z.add_(y)

    assert [s.name for s in dataflow(Sum()).steps] == ["input", "input", "add", "add", "add", "add", "output"]


@pytest.mark.parametrize(
    ("use", "found"),
    [
        (lambda norm, y: norm(y) + y, {}),  # something else takes the output too
        (lambda norm, y: norm(y).view(y.size(0), y.shape[1] * y.shape[2] // 2, -1), {"norm": "conv"}),
    ],
)
def test_a_use_of_the_values_counts_and_reading_a_shape_does_not(use, found):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return use(self.norm, self.conv(x))

    assert producers(Net()) == found


def test_a_shared_convolution_counts_only_if_the_same_norm_follows_each_call():
    class Shared(nn.Module):
        def __init__(self, norms):
            super().__init__()
            self.conv, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList(norms)

        def forward(self, x):
            for norm in self.norms:
                x = norm(self.conv(x))
            return x

    norm = nn.BatchNorm2d(4)
    assert producers(Shared([norm, norm])) == {"norms.0": "conv"}
    assert producers(Shared([norm, nn.BatchNorm2d(4)])) == {}


def test_a_norm_over_another_dimension_than_a_linear_layers_outputs_has_no_producer():
    for norm in (nn.BatchNorm1d(7), nn.InstanceNorm1d(7), nn.GroupNorm(7, 7), normkit.BatchlessNorm1d(7)):
        model = nn.Sequential(nn.Linear(5, 4), norm)  # (N, 7, 5): each of the 4 outputs meets all 7 channels
        assert model(torch.randn(3, 7, 5)).shape == (3, 7, 4)
        assert producers(model) == {}


def test_optional_arguments_take_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x, mask=None, scale=1.0, verbose=False):
            if mask is not None:
                x = x * mask
            if verbose:
                raise AssertionError
            return self.norm(self.fc(x)) * scale

    assert producers(Optional()) == {"norm": "fc"}


def test_subclasses_of_convolution_and_norm_layers_are_leaves():
    class MyConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    class MyNorm(nn.BatchNorm2d):
        pass

    assert producers(nn.Sequential(MyConv(3, 4, 3), MyNorm(4))) == {"1": "0"}


def test_tracing_neither_runs_hooks_nor_changes_the_model():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.calls = nn.Linear(3, 4), nn.BatchNorm1d(4), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return self.norm(self.fc(x))

    model = Counting()

    def hook(*_):
        raise AssertionError("a hook ran")

    for module in model.modules():
        module.register_forward_hook(hook)
    assert producers(model) == {"norm": "fc"}
    assert model.calls == 0
    assert model.seen.item() == 0


@pytest.mark.parametrize("model", [nn.BatchNorm2d(3), nn.ModuleList([nn.Linear(2, 2)]), nn.Identity()])
def test_models_without_a_flow_have_no_producers(model):
    assert producers(model) == {}
