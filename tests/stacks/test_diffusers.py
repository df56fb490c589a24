"""diffusers: models that keep their configuration in a dict that may not be written to."""

import pytest
import torch

import normkit

pytest.importorskip("diffusers", reason="needs diffusers, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from diffusers import UNet2DModel  # noqa: E402


def network():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        **blocks,
    )


@pytest.mark.parametrize("name", ["none", "bnp", "layer", "group+bnp"])
def test_a_unet_trains_and_reverts_and_keeps_its_configuration(name):
    model = network()
    config = dict(model.config)
    model, optimizer = normkit.apply(name, model, lr=0.01)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x, 10).sample - x).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert dict(model.config) == config
    if "bnp" in name:
        (preconditioned,) = (e for e in normkit.describe(model, optimizer).effects if e.verb == "preconditioned")
        assert not preconditioned.left
        normkit.handle(optimizer).remove()
    assert [type(m) for m in normkit.revert(model).modules()] == [type(m) for m in network().modules()]
