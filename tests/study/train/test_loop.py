"""The training loop: every option does what it says, and an interrupted run goes on exactly."""

import dataclasses
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

import normkit
from normkit.study.config import StudyConfig
from normkit.study.data import batches as batches_module
from normkit.study.data.samples import MicroBatch
from normkit.study.load import load
from normkit.study.train import loop as loop_module
from normkit.study.train.loop import Loop, evaluate, training_step
from normkit.study.train.trial import build_trial, run_trial
from tests.study.train.trials import key, without_time

CONFIG = StudyConfig(model="digits-cnn", methods=("batch", "none"), batch_sizes=(16,), budget=200)


@pytest.fixture(scope="module")
def task():
    return load(CONFIG)


class Killed(BaseException):
    """Stands for a kill: nothing in a trial catches it."""


def killed_after(points):
    def watch(_):
        nonlocal points
        points -= 1
        if points < 0:
            raise Killed
        return False

    return watch


@pytest.fixture
def always_checkpoint(monkeypatch):
    monkeypatch.setattr(loop_module, "CHECKPOINT_SECONDS", 0.0)


@pytest.mark.parametrize("method", normkit.recipes())
def test_a_killed_run_of_every_method_goes_on_to_the_same_result_bit_for_bit(method, tmp_path, always_checkpoint):
    model = "resnet20" if method == "zero-gamma" else CONFIG.model  # it needs residual blocks
    options = {"crop": 1, "ema": 0.9, "schedule": "one-cycle", "weight_decay": 1e-4, "best_weights": True}
    config = dataclasses.replace(CONFIG, model=model, **options)
    task = load(config)
    whole = run_trial(config, key(method), task)
    assert whole.state == "finished"
    validated = [(p.validation_score, -p.examples) for p in whole.curve if p.validation_score is not None]
    assert (whole.validation_score, -min(200, 16 * whole.best_step)) == max(validated)
    for points in (1, 6):
        with pytest.raises(Killed):
            run_trial(config, key(method), task, folder=tmp_path, on_point=killed_after(points))
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    torch.manual_seed(99)
    again = run_trial(config, key(method), task, folder=tmp_path)
    assert without_time(again) == without_time(whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", ["nesterov", "adam", "adamw"])
def test_a_killed_run_with_dropout_goes_on_exactly(task, optimizer, tmp_path, always_checkpoint, monkeypatch):
    def with_dropout(config, key, task):
        model, made = build_trial(config, key, task)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda m, _, out: torch.dropout(out, 0.2, m.training))
        return model, made

    monkeypatch.setattr("normkit.study.train.trial.build_trial", with_dropout)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    whole = run_trial(config, key(lr=1e-3), task)
    with pytest.raises(Killed):
        run_trial(config, key(lr=1e-3), task, folder=tmp_path, on_point=killed_after(4))
    assert without_time(run_trial(config, key(lr=1e-3), task, folder=tmp_path)) == without_time(whole)


def test_after_a_damaged_checkpoint_the_trial_starts_anew_and_gives_the_same_result(task, tmp_path, always_checkpoint):
    whole = run_trial(CONFIG, key(), task)
    with pytest.raises(Killed):
        run_trial(CONFIG, key(), task, folder=tmp_path, on_point=killed_after(5))
    (file,) = tmp_path.glob("*.ckpt")
    file.write_bytes(file.read_bytes()[:-100])
    seen = []
    again = run_trial(CONFIG, key(), task, folder=tmp_path, on_point=lambda p: bool(seen.append(p)))
    assert without_time(again) == without_time(whole)
    assert len(seen) == len(whole.curve)


def test_two_studies_in_one_folder_never_meet(task, tmp_path, always_checkpoint):
    other = dataclasses.replace(CONFIG, weight_decay=0.1)
    expected = [without_time(run_trial(c, key(), task)) for c in (CONFIG, other)]
    for config in (CONFIG, other):
        with pytest.raises(Killed):
            run_trial(config, key(), task, folder=tmp_path, on_point=killed_after(3))
    # the later one first: it would go on from the other's state, which brings its own weight decay along
    again = [without_time(run_trial(c, key(), task, folder=tmp_path)) for c in (other, CONFIG)]
    assert again[::-1] == expected
    assert expected[0] != expected[1]


def test_time_spent_before_a_kill_counts(task, tmp_path, always_checkpoint):
    with pytest.raises(Killed):
        run_trial(CONFIG, key(), task, folder=tmp_path, on_point=killed_after(6))
    (file,) = tmp_path.glob("*.ckpt")
    digest = 32  # bytes in front of the content
    state = torch.load(io.BytesIO(file.read_bytes()[digest:]), weights_only=True)["state"]
    earlier = state["progress"][1]
    assert earlier > 0
    assert run_trial(CONFIG, key(), task, folder=tmp_path).seconds > earlier


def test_a_pruned_run_says_so_and_is_not_tested(task):
    result = run_trial(CONFIG, key(), task, on_point=lambda point: point.examples >= 100)
    assert (result.state, result.test_score) == ("pruned", None)
    assert 100 <= result.curve[-1].examples < 200


def one_step(task, config, method="none", lr=0.1, dtype=torch.float64):
    batch = next(task.training_batches(batch_size=12, budget=12, seed=0, micro_batch=config.micro_batch))
    batch = [MicroBatch((inputs.to(dtype), labels), samples) for (inputs, labels), samples in batch]
    model, optimizer = build_trial(config, key(method, lr=lr), task)
    model.to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    network = loop_module.prepare(config, model, task.training_loss)
    loss = training_step(network, optimizer, batch, config)
    return model, before, loss, *batch[0].batch


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
def test_micro_batches_make_the_step_of_the_whole_batch(task, micro_batch):
    whole, *_ = one_step(task, CONFIG)
    parts, *_ = one_step(task, dataclasses.replace(CONFIG, micro_batch=micro_batch))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_label_smoothing_is_cross_entropy_with_spread_labels(task):
    smoothing = 0.1
    config = dataclasses.replace(CONFIG, label_smoothing=smoothing)
    _, _, loss, inputs, labels = one_step(load(config), config)
    fresh, _ = build_trial(CONFIG, key("none"), task)
    log_p = log_softmax(fresh.double()(inputs), dim=1)
    target = (1 - smoothing) * nn.functional.one_hot(labels, 10) + smoothing / 10
    assert loss.item() == pytest.approx(-(target * log_p).sum(1).mean().item(), rel=1e-6)


def test_weight_averages_are_what_is_judged(task):
    config = dataclasses.replace(CONFIG, ema=0.99, budget=96)
    model, optimizer = build_trial(config, key(), task)
    loop = Loop(config, key(), task, model, optimizer)
    *_, last = loop.points()
    with loop.evaluated():
        averaged = evaluate(model, task, "validation", config)
    assert averaged[0] == last.validation_score
    assert averaged != evaluate(model, task, "validation", config)
    assert run_trial(config, key(), task).validation_loss == averaged[1]


def test_amp_computes_in_bfloat16_and_keeps_fp32_weights(task):
    config = dataclasses.replace(CONFIG, amp=True, micro_batch=5)
    model, optimizer = build_trial(config, key(), task)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    batch = next(task.training_batches(batch_size=12, budget=12, seed=0, micro_batch=5))
    training_step(loop_module.prepare(config, model, task.training_loss), optimizer, batch, config)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run_trial(config, key(), task).state == "finished"


def test_channels_last_changes_the_layout_and_not_the_step(task):
    plain, *_ = one_step(task, CONFIG)
    config = dataclasses.replace(CONFIG, channels_last=True)
    other, *_ = one_step(task, config)
    convolutions = [m for m in other.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_compile_trains_the_same_model(task, monkeypatch):
    compiled = []

    def compile_(module):
        compiled.append(module)
        return real(module)

    real = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_)
    result = run_trial(dataclasses.replace(CONFIG, compile=True, budget=64), key(), task)
    expected = run_trial(dataclasses.replace(CONFIG, budget=64), key(), task)
    assert len(compiled) == 1
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "kind", "nesterov"),
    [("sgd", "SGD", False), ("nesterov", "SGD", True), ("adam", "Adam", None), ("adamw", "AdamW", None)],
)
def test_the_optimizer_is_the_one_asked_for(task, optimizer, kind, nesterov):
    _, made = build_trial(dataclasses.replace(CONFIG, optimizer=optimizer, weight_decay=0.01), key(), task)
    assert type(made).__name__ == kind
    assert made.defaults.get("nesterov") == nesterov
    assert made.defaults["weight_decay"] == 0.01


def test_the_schedule_reaches_the_optimizer(task):
    config = dataclasses.replace(CONFIG, schedule="step", warm_up=0.0)
    model, optimizer = build_trial(config, key(lr=0.1), task)
    for _ in Loop(config, key(lr=0.1), task, model, optimizer).points():
        pass
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.2**3)


def test_a_run_sees_augmented_images_at_training_only(monkeypatch):
    seen = []
    real = batches_module.augment
    monkeypatch.setattr(
        batches_module, "augment", lambda images, *rest: seen.append(len(images)) or real(images, *rest)
    )
    config = dataclasses.replace(CONFIG, flip=True)
    plain, flipped = run_trial(CONFIG, key(), load(CONFIG)), run_trial(config, key(), load(config))
    assert sum(seen) == CONFIG.budget
    assert plain.curve != flipped.curve
