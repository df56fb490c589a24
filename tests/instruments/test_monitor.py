"""The Monitor: what it writes, that it disturbs nothing, and how it works on two ranks."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import normkit
from normkit.instruments import Monitor, angular, channels, curvature, gradient_removed, landscape, snapshot
from tests.cases import batch_loss, batches
from tests.instruments import monitor_ranks


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 3)
    )


def make_batches(count):
    return batches((1, 4, 4), count)


def train(model, optimizer, batches, monitor=None):
    for batch in batches:
        optimizer.zero_grad()
        loss = batch_loss(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.observe(batch, loss)
        optimizer.step()


@pytest.mark.parametrize("recipe", [name for name in normkit.recipes() if name != "zero-gamma"])
def test_a_watched_run_is_bit_identical_to_an_unwatched_one(recipe):
    finals = []
    for watch in (False, True):
        model, optimizer = normkit.apply(
            recipe, make_net(), lr=0.05, weight_decay=1e-3, batches=[x for x, _ in make_batches(2)]
        )
        monitor = Monitor(model, batch_loss, optimizer, every=2) if watch else None
        train(model, optimizer, make_batches(4), monitor)
        finals.append(model.state_dict())
    for name in finals[0]:
        assert torch.equal(finals[0][name], finals[1][name]), name


def test_records_are_those_of_the_instruments():
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    batches = make_batches(3)
    expected = {}
    walk = {"steps": 3, "span": (0.01, 30)}
    with Monitor(model, batch_loss, optimizer, every=2, **walk) as monitor:
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            loss = batch_loss(model, batch)
            loss.backward()
            if step == 2:
                expected["walk"] = landscape(model, batch_loss, batch, lr=0.1, **walk)
                expected["curvature"] = curvature(model, batch_loss, batch, lr=0.1)
                expected["removed"] = gradient_removed(model, batch_loss, batch)
                expected["channels"] = channels(model, batch_loss, batch)
                before = snapshot(model)
                size = math.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
            monitor.observe(batch, loss)
            optimizer.step()
        expected["angular"] = angular(model, optimizer, before)
    record = monitor.history[1]
    assert record["step"] == 2
    assert record["loss"] == pytest.approx(loss.item())
    assert record["gradient_norm"] == pytest.approx(size, rel=1e-5)
    assert record["landscape"]["beta"] == expected["walk"].beta
    assert (record["landscape"]["loss_low"], record["landscape"]["loss_high"]) == expected["walk"].loss_band
    assert record["curvature"]["directional"] == expected["curvature"].directional
    assert record["curvature"]["stability"] == expected["curvature"].stability
    assert record["removed"] == expected["removed"].layers
    assert record["channels"] == expected["channels"].summary()
    assert record["angular"]["0"]["angle"] == expected["angular"].layers[0].angle


def test_one_json_line_per_step_and_one_measurement_per_cadence(tmp_path):
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, batch_loss, optimizer, every=3, path=tmp_path / "run.jsonl") as monitor:
        train(model, optimizer, make_batches(7), monitor)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "landscape" in line] == [0, 3, 6]
    assert {"step", "lr", "loss", "gradient_norm"} == lines[1].keys()
    assert lines[3]["angular"]["0"]["angle"] > 0
    assert not optimizer._optimizer_step_post_hooks


def test_a_loss_that_is_changed_in_place_afterwards_is_recorded_as_it_was_observed():
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, batch_loss, optimizer) as monitor:
        batch = make_batches(1)[0]
        loss = batch_loss(model, batch)
        loss.backward()
        observed = loss.item()
        monitor.observe(batch, loss)
        loss.detach().zero_()
        optimizer.zero_grad(set_to_none=False)
    assert monitor.history[0]["loss"] == observed
    assert monitor.history[0]["gradient_norm"] > 0


def test_a_diverging_run_is_written_as_json_all_the_same(tmp_path):
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with Monitor(model, batch_loss, optimizer, every=1, path=tmp_path / "run.jsonl") as monitor:
        train(model, optimizer, make_batches(3), monitor)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] is None


def test_a_warm_up_may_start_at_zero():
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, batch_loss, optimizer) as monitor:
        train(model, optimizer, make_batches(1), monitor)
    assert "landscape" not in monitor.history[0]
    assert "curvature" in monitor.history[0]


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, batch_loss, optimizer, every=2, tensorboard=tmp_path) as monitor:
        train(model, optimizer, make_batches(3), monitor)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    beta = events.Scalars("landscape/beta")
    assert [event.step for event in beta] == [0, 2]
    assert beta[0].value == pytest.approx(monitor.history[0]["landscape"]["beta"], rel=1e-6)
    assert len(events.Scalars("loss")) == 3


def test_bfloat16_autocast_is_measured():
    model = make_net()
    model[4].p = 0.0  # masks differ between dtypes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return batch_loss(model, batch)

    half, full = (Monitor(model, f, optimizer, every=1) for f in (autocast, batch_loss))
    batch = make_batches(1)[0]
    for monitor in (half, full):
        monitor.observe(batch, batch_loss(model, batch))
    a, b = half.history[0]["landscape"], full.history[0]["landscape"]
    assert a["loss_low"] == pytest.approx(b["loss_low"], rel=0.05)
    assert a["beta"] == pytest.approx(b["beta"], rel=0.3)


def test_the_cadence_must_be_positive():
    model = make_net()
    with pytest.raises(ValueError, match="every is 0"):
        Monitor(model, batch_loss, torch.optim.SGD(model.parameters(), lr=0.1), every=0)


def test_monitor_plots_its_loss_band():
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
    matplotlib.use("Agg")
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, batch_loss, optimizer, every=1) as monitor:
        train(model, optimizer, make_batches(2), monitor)
    assert monitor.plot().collections


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_measures_and_rank_0_writes():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(monitor_ranks.watch, (folder,), nprocs=2)
        assert not (Path(folder) / "1.jsonl").exists()
        lines = [json.loads(line) for line in (Path(folder) / "0.jsonl").read_text().splitlines()]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, monitor_ranks.sums, optimizer, every=1) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss = monitor_ranks.sums(model, monitor_ranks.ddp_batch())
            loss.backward()
            monitor.observe(monitor_ranks.ddp_batch(), loss)
            optimizer.step()
    for line, record in zip(lines, monitor.history, strict=True):
        assert line["loss"] == pytest.approx(record["loss"], rel=1e-6)
        assert line["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-6)
        assert line["landscape"] == pytest.approx(record["landscape"], rel=1e-9)
        assert line["curvature"] == pytest.approx(record["curvature"], rel=1e-5)
