"""Trained networks keep their function on the way to another method, or it is said that they do not."""

import logging

import pytest
import torch
from torch import nn

import normkit


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(16, 3, 8, 8) * 2 + 1
    for _ in range(20):
        model(x)
    return model, x


def test_folding_first_lets_bnp_start_from_the_function_of_a_trained_network(caplog):
    model, x = trained()
    expected = model.eval()(x)
    plain, optimizer = normkit.apply("bnp", normkit.fold(model).train(), lr=0.01)
    assert "trained statistics" not in caplog.text
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    plain(x).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(plain(x), expected)


@pytest.mark.parametrize("recipe", ["bnp", "none"])
def test_removing_trained_batch_normalization_says_that_the_function_is_lost_and_what_keeps_it(recipe, caplog):
    normkit.apply(recipe, trained()[0], lr=0.01)
    assert f"normkit.apply('{recipe}', normkit.fold(model).train(), ...)" in caplog.text
    caplog.clear()
    normkit.apply(recipe, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lr=0.01)
    assert "trained statistics" not in caplog.text


def test_batchless_without_batches_says_that_they_matter_on_an_untrained_network(caplog):
    caplog.set_level(logging.WARNING, "normkit")
    normkit.apply("batchless", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lr=0.01)
    assert "give batches=, a few hundred samples" in caplog.text
    caplog.clear()
    normkit.apply("batchless", trained()[0], lr=0.01)
    _, x = trained()
    normkit.apply("batchless", nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), lr=0.01, batches=[x])
    assert "batches=" not in caplog.text


@pytest.mark.parametrize("to", ["batchless", "batch-renorm", "noisy-batch", "frozen", "l2"])
@pytest.mark.filterwarnings("ignore:fold. 1 layer stays")
def test_where_a_batch_normalization_would_do_the_folded_copy_has_torchs(to):
    class Net(nn.Module):  # the norm has no neighbour to fold into
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x).tanh()).tanh()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 8, 8)
    model(x)
    model = normkit.convert(model, to).eval()
    folded = normkit.fold(model)
    assert type(folded.norm) is nn.BatchNorm2d
    assert not any(type(m).__module__.startswith("normkit") for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class FrozenBatchNorm2d(nn.Module):  # as in torchvision and in transformers (DETR)
    def __init__(self, features):
        super().__init__()
        self.register_buffer("weight", torch.rand(features) + 0.5)
        self.register_buffer("bias", torch.randn(features))
        self.register_buffer("running_mean", torch.randn(features))
        self.register_buffer("running_var", torch.rand(features) + 0.5)

    def forward(self, x):
        weight, bias, var, mean = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + bias - mean * scale


@pytest.mark.parametrize("to", ["batch", "batchless", "frozen", "group", "none"])
def test_batch_normalization_made_of_buffers_is_converted_and_comes_back(to):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8), nn.ReLU()).eval()
    layer, x = model[1], torch.randn(4, 3, 8, 8)
    expected, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    normkit.convert(model, to)
    if to in ("batch", "batchless", "frozen"):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert model[1].weight.requires_grad
    if to != "none":
        model.load_state_dict(state, strict=to != "batch")  # whose counter no such layer has
    normkit.revert(model)
    assert model[1] is layer
    assert not list(layer.parameters())
    assert torch.equal(model(x), expected)


class BatchNormAct2d(nn.BatchNorm2d):  # as in timm
    def __init__(self, features):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("to", ["batchless", "frozen", "l2", "batch-renorm", "group", "none"])
def test_a_norm_with_an_activation_built_in_keeps_the_activation(to):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8)), torch.randn(16, 3, 8, 8)
    model(x)
    layer, expected, seen = model[1], model.eval()(x), []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        normkit.convert(model, to)
        if to in ("batchless", "frozen", "batch-renorm"):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert model(x).min() > -0.3  # the least that SiLU returns is -0.28
        assert seen[-1].min() > -0.3
        normkit.revert(model)
        assert model[1] is layer
        assert torch.equal(model(x), expected)
    assert len(layer._forward_hooks) == 1
    handle.remove()
