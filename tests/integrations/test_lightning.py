"""The Lightning callbacks: their order relative to clipping, checkpoints, and the example."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs normkit[lightning]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    from normkit.integrations.lightning import BatchlessCallback, BNPCallback, MonitorCallback

import normkit

pytestmark = pytest.mark.filterwarnings("ignore")  # the framework's own warnings about workers and loggers


def net(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).double()


class Module(pl.LightningModule):
    def __init__(self, network, optimizers=1):
        super().__init__()
        self.network, self.count = network, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch, index):
        return mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9) for _ in range(self.count)]


def loader(size=4):
    rng = torch.Generator().manual_seed(1)
    x, y = (torch.randn(24, n, generator=rng, dtype=torch.float64) for n in (3, 2))
    return DataLoader(TensorDataset(3 + x, 5 * y), batch_size=size)


def fit(module, callbacks, steps=6, size=4, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoint = options.pop("ckpt_path", None)
    trainer = pl.Trainer(max_steps=steps, callbacks=callbacks, **{**quiet, "enable_checkpointing": False, **options})
    trainer.fit(module, loader(size), ckpt_path=checkpoint)
    return trainer


def by_hand(network, steps=6, clip=None, every=1, size=4):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    bnp = normkit.BNP(network)
    bnp.attach(optimizer)
    batches = [b for _ in range(9) for b in loader(size)]
    for step in range(steps):
        optimizer.zero_grad()
        for x, y in batches[step * every : (step + 1) * every]:
            (mse_loss(network(x), y) / every).backward()
        bnp.precondition_()
        if clip:
            assert nn.utils.clip_grad_norm_(network.parameters(), clip) > clip
        optimizer.step()
    return network


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


class Manual(Module):
    """Steps and clips by itself."""

    def __init__(self, network):
        super().__init__(network)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


def test_bnp_preconditions_and_then_the_module_clips_in_manual_optimization():
    module = Manual(net())
    fit(module, [BNPCallback()])
    assert_same(module.network, by_hand(net(), clip=0.1))
    assert "clip_gradients" not in vars(module)


@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"clip": 0.1, "every": 2}])
def test_bnp_preconditions_and_then_lightning_clips(options):
    module = Module(net())
    fit(
        module,
        [BNPCallback()],
        gradient_clip_val=options.get("clip"),
        accumulate_grad_batches=options.get("every", 1),
    )
    assert_same(module.network, by_hand(net(), **options))
    assert not any(m._forward_hooks for m in module.modules())


class Save(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def test_statistics_of_bnp_come_back_from_a_checkpoint(tmp_path):
    whole = {"size": 24}  # one batch is one epoch: Lightning repeats what it saw of an unfinished one
    fit(Module(net()), [BNPCallback(), Save(tmp_path / "kept.ckpt")], steps=3, **whole)
    resumed = Module(net())
    fit(resumed, [BNPCallback()], steps=6, ckpt_path=tmp_path / "kept.ckpt", **whole)
    assert_same(resumed.network, by_hand(net(), **whole))


def test_statistics_of_bnp_are_in_a_checkpoint_of_a_fit_that_has_ended(tmp_path):
    whole = {"size": 24}
    trainer = fit(Module(net()), [BNPCallback()], steps=3, **whole)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    resumed = Module(net())
    fit(resumed, [BNPCallback()], steps=6, ckpt_path=tmp_path / "kept.ckpt", **whole)
    assert_same(resumed.network, by_hand(net(), **whole))


def test_layers_that_need_a_group_before_the_scheduler_are_refused():
    network = normkit.convert(net(norm=True), "batchless", gradient="plain")
    with pytest.raises(ValueError, match=r"network\.1: gradient='plain' .* before the scheduler"):
        fit(Module(network), [BatchlessCallback()])


def test_batchless_trains_its_statistics():
    network = normkit.convert(net(norm=True), "batchless")
    module = Module(network)
    before = {name: p.clone() for name, p in network[1].named_parameters()}
    fit(module, [BatchlessCallback()], gradient_clip_val=0.1)
    assert not torch.equal(network[1].running_mean, before["running_mean"])
    assert not torch.equal(network[1].running_var, before["running_var"])
    expected = normkit.convert(net(norm=True), "batchless")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    normkit.attach(expected, optimizer)
    for x, y in loader():
        optimizer.zero_grad()
        mse_loss(expected(x), y).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    assert_same(network, expected)


def test_the_monitor_watches_without_disturbing():
    plain, watched = Module(net(norm=True)), Module(net(norm=True))
    fit(plain, [])
    callback = MonitorCallback(lambda module, batch: mse_loss(module.network(batch[0]), batch[1]), every=3)
    fit(watched, [callback])
    assert [record["step"] for record in callback.monitor.history] == [0, 3]
    assert callback.monitor.history[0]["loss"] > 0
    assert callback.monitor.history[0]["landscape"]["beta"] > 0
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )


def test_several_optimizers_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"exactly one optimizer.*by hand"):
        fit(Module(net(), optimizers=2), [BNPCallback()])


@pytest.mark.slow
def test_the_example_runs():
    path = Path(__file__).parents[2] / "docs" / "examples" / "lightning_callbacks.py"
    spec = importlib.util.spec_from_file_location("lightning_callbacks", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    accuracy, monitor = example.main(epochs=3)
    assert accuracy > 0.9
    assert len(monitor.monitor.history) > 2
