"""MONAI: networks for volumes, and its supervised trainer."""

import pytest
import torch

import normkit
from tests.stacks.common import assert_same

pytest.importorskip("monai", reason="needs monai, which is no extra of normkit")
pytest.importorskip("ignite", reason="MONAI's engines need pytorch-ignite")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from monai.engines.trainer import SupervisedTrainer  # noqa: E402
from monai.losses.dice import DiceLoss  # noqa: E402
from monai.networks.nets.unet import UNet  # noqa: E402

NORMS = 6


def network():
    torch.manual_seed(0)
    return UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="batch")


def data():
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, 2, 1, 8, 8, 8, generator=draw)
    return [{"image": x, "label": (x > 0).float()} for x in images]


@pytest.mark.parametrize("name", ["bnp", "batchless", "group", "sgd-g", "revisited"])
def test_its_trainer_trains_as_the_loop_written_out(name):
    loss = DiceLoss(sigmoid=True, to_onehot_y=False)
    model, optimizer = normkit.apply(name, network(), lr=0.05)
    SupervisedTrainer(
        torch.device("cpu"), 2, data(), model, optimizer, lambda p, y: loss(p[:, :1], y), epoch_length=3
    ).run()
    other, its = normkit.apply(name, network(), lr=0.05)
    for batch in data() * 2:
        its.zero_grad()
        loss(other(batch["image"])[:, :1], batch["label"]).backward()
        its.step()
    assert_same(model, other)
    effects = {effect.verb: effect for effect in normkit.describe(model, optimizer).effects}
    if name in ("bnp", "batchless", "group"):
        assert len(effects["replaced"].done) == NORMS
        assert not effects["replaced"].left
