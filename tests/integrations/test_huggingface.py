"""The callbacks for Hugging Face's Trainer: their order relative to clipping, checkpoints, and the example."""

import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

pytest.importorskip("transformers", reason="needs normkit[transformers]")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.modeling_outputs import ModelOutput

    from normkit.integrations.huggingface import BatchlessCallback, BNPCallback, MonitorCallback

import normkit

pytestmark = pytest.mark.filterwarnings("ignore")  # the framework's own warnings


class Model(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(3, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 2)]
        self.network = nn.Sequential(*layers)

    def forward(self, x, labels=None):
        out = self.network(x)
        return ModelOutput(loss=mse_loss(out, labels), logits=out)


def rows():
    rng = torch.Generator().manual_seed(1)
    x, y = 3 + torch.randn(24, 3, generator=rng), 5 * torch.randn(24, 2, generator=rng)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(model, callbacks, folder, resume=None, run=True, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 6,
    }
    trainer = InOrder(
        model, TrainingArguments(str(folder), **{**defaults, **options}), train_dataset=rows(), callbacks=callbacks
    )
    if run:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(model, steps=6, clip=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnp = normkit.BNP(model)
    bnp.attach(optimizer)
    data = rows() * 2
    for step in range(steps):
        part = data[4 * step : 4 * step + 4]
        optimizer.zero_grad()
        model(*(torch.stack([row[name] for row in part]) for name in ("x", "labels"))).loss.backward()
        bnp.precondition_()
        assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
    return model


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_bnp_preconditions_and_then_clips(tmp_path):
    model = Model()
    trainer = train(model, [BNPCallback()], tmp_path)
    assert_same(model, by_hand(Model()))
    assert trainer.args.max_grad_norm == 0.1
    assert not any(m._forward_hooks for m in model.modules())


def test_an_interrupted_training_can_be_started_again(tmp_path):
    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callbacks = [BNPCallback(), BatchlessCallback(), MonitorCallback(every=2)]
    model = Model(norm=True)
    normkit.convert(model, "batchless")
    trainer = train(model, [*callbacks, Interrupted()], tmp_path, run=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupted)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.1
    assert not any(m._forward_hooks for m in model.modules())
    assert [record["step"] for record in callbacks[2].monitor.history] == [0, 2, 4]


def test_statistics_of_bnp_come_back_from_a_checkpoint(tmp_path):
    train(Model(), [BNPCallback()], tmp_path, save_strategy="steps", save_steps=3)
    assert (tmp_path / "checkpoint-3" / "bnp.pt").exists()
    resumed = Model()
    train(resumed, [BNPCallback()], tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, by_hand(Model()))


def test_statistics_that_are_missing_when_training_resumes_are_named(tmp_path, caplog):
    train(Model(), [BNPCallback()], tmp_path, save_strategy="steps", save_steps=3)
    train(Model(), [BNPCallback()], tmp_path / "other", resume=str(tmp_path / "checkpoint-3"))
    assert "resumes at step 3, but there is no" in caplog.text
    caplog.clear()
    kept = str(tmp_path / "checkpoint-3")
    resumed = Model()
    train(resumed, [BNPCallback()], tmp_path / "third", resume=kept, resume_from_checkpoint=kept)
    assert "but there is no" not in caplog.text
    assert_same(resumed, by_hand(Model()))


def test_fp16_is_refused_with_the_remedy():
    arguments = SimpleNamespace(fp16=True)
    with pytest.raises(ValueError, match="use bf16=True"):
        BNPCallback().on_train_begin(arguments, None, None, model=Model())


def test_batchless_trains_its_statistics(tmp_path):
    model = normkit.convert(Model(norm=True), "batchless")
    norm = model.network[1]
    before = norm.running_mean.clone(), norm.running_var.clone()
    train(model, [BatchlessCallback()], tmp_path)
    assert not torch.equal(norm.running_mean, before[0])
    assert not torch.equal(norm.running_var, before[1])
    assert not norm.is_collected


def test_the_monitor_watches_without_disturbing(tmp_path):
    plain, watched = Model(norm=True), Model(norm=True)
    train(plain, [], tmp_path)
    callback = MonitorCallback(every=3)
    train(watched, [callback], tmp_path)
    assert [record["step"] for record in callback.monitor.history] == [0, 3]
    assert callback.monitor.history[0]["landscape"]["beta"] > 0
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert not watched._forward_hooks


@pytest.mark.slow
def test_the_example_runs():
    path = Path(__file__).parents[2] / "docs" / "examples" / "huggingface_callbacks.py"
    spec = importlib.util.spec_from_file_location("huggingface_callbacks", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    trainer, monitor = example.main(steps=12)
    assert trainer.state.global_step == 12
    assert [record["step"] for record in monitor.monitor.history] == [0, 10]
