"""Zero-gamma finds the end of residual branches by structure, and blocks start as their shortcuts."""

import pytest
import torch
from torch import nn

import normkit
from normkit.inspection.branches import branch_ends
from normkit.methods.method import zero_last_weights
from normkit.methods.zero_gamma import last_norms, zero_gamma
from normkit.study.models import build_model
from normkit.surgery._convert import convert


def image_model(name):
    torch.manual_seed(0)
    return build_model(name, input_shape=(3, 8, 8), classes=4)


@pytest.mark.parametrize(
    ("name", "last", "blocks"), [("resnet20", "norm2", 9), ("resnet18", "norm2", 8), ("resnet50", "norm3", 16)]
)
def test_the_last_norm_of_each_block_is_found_and_no_shortcut(name, last, blocks):
    found = last_norms(image_model(name))
    assert len(found) == blocks
    assert all(path.endswith(last) for path in found)


class UnusualBlock(nn.Module):
    """The shortcut comes first in the sum, the branch passes dropout, and the norms' names mislead."""

    def __init__(self):
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.last = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.shortcut = nn.BatchNorm2d(4)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x):
        out = self.last(x)
        out += self.drop(self.shortcut(self.downsample(x)))
        return out.relu()


class SumOfEqualBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.left(x) + self.right(x)


def test_the_branch_is_the_longer_side_of_the_sum_whatever_its_name_and_place():
    assert last_norms(UnusualBlock()) == ["shortcut"]


def test_a_sum_of_equal_branches_is_no_residual_block():
    assert last_norms(SumOfEqualBranches()) == []


def test_every_block_starts_as_its_shortcut():
    model = zero_gamma(image_model("resnet20")).eval()
    x = torch.randn(2, 16, 8, 8).relu()
    for block in model[3:6]:  # the blocks of the first stage keep the shape
        assert torch.equal(block(x), x)
    assert model[3].norm1.weight.eq(1).all()


@pytest.mark.parametrize("name", ["digits-cnn", "wrn-10-1"])
def test_a_model_without_such_a_branch_is_refused_and_left_as_it_was(name):
    model = image_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no residual branch"):
        zero_gamma(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", slice(3, 6)), ("wrn-10-1", slice(0, 0))])
def test_without_norms_the_last_weights_start_at_zero_and_train(name, blocks):
    model = zero_last_weights(convert(image_model(name), "none"))
    x = torch.randn(2, 16, 8, 8).relu()
    for block in model[blocks]:
        assert torch.equal(block(x), x)
    ends = [model.get_submodule(path) for path in branch_ends(model)]
    assert len(ends) == {"resnet20": 9, "wrn-10-1": 3}[name]
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(not end.weight.any() and end.weight.grad.any() for end in ends)


def test_a_model_whose_branches_end_in_norms_or_that_has_none_keeps_its_weights():
    for name in ("resnet20", "digits-cnn"):
        model = image_model(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="no residual branch"):
            zero_last_weights(model)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["none", "bnp"])
def test_branches_start_at_zero_where_the_user_says_so(recipe):
    model, _ = normkit.apply(recipe, image_model("resnet20"), lr=0.1, options={"zero_residual": True})
    assert all(not model.get_submodule(path).weight.any() for path in branch_ends(model))
    model, _ = normkit.apply(recipe, image_model("resnet20"), lr=0.1)
    assert all(model.get_submodule(path).weight.any() for path in branch_ends(model))


def test_transformers_resnet_is_understood():
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    found = last_norms(model)
    assert len(found) == 4
    assert all(".layer.1." in path for path in found)
