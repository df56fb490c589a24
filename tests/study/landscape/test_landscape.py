"""The landscape study and the paper's experiments at toy size: what they measure, judge and write."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from normkit.cli.main import main
from normkit.instruments.result import plain
from normkit.methods.noisy_norm import MomentNoise
from normkit.study.config import HowBNHelps, LandscapeConfig
from normkit.study.errors import StudyError
from normkit.study.landscape.records import Trace
from normkit.study.landscape.run import apply, run_landscape, train_and_measure
from normkit.study.papers.how_bn_helps import DEEP_LINEAR, deep_linear_task, findings
from normkit.study.report.landscape import figures_of, sections, table, write_landscape

SMALL = LandscapeConfig(methods=("none", "batch", "none+noise"), batch_size=32, steps=6, every=3, limit=200)


@pytest.fixture(scope="module")
def record():
    return run_landscape(SMALL, command="normkit landscape --steps 6")


def test_every_method_is_measured_on_the_cadence(record):
    assert [trace.method for trace in record.traces] == ["none", "batch", "none+noise"]
    for trace in record.traces:
        assert [r["step"] for r in trace.records] == [0, 3]
        assert [step for step, _ in trace.shifts] == [step for step, _ in trace.drifts] == [0, 3]
        assert len(trace.losses) == 6
        assert 0 <= trace.score <= 1


def test_runs_are_deterministic_and_share_data_and_weights(record):
    again = run_landscape(replace(SMALL, methods=("batch",)))
    assert plain(again.traces[0]) == plain(record.traces[1])


def test_noise_moves_the_activations_of_a_plain_net(record):
    none, _, noise = (figures_of(trace) for trace in record.traces)
    assert noise["drift"] > 3 * none["drift"]


def test_the_noise_stands_where_the_normalization_was():
    model, _ = apply("none+noise", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU()), lr=0.1)
    assert isinstance(model[1][1], MomentNoise)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())


def test_the_page_stands_alone_and_has_a_figure_for_everything(record, tmp_path):
    page, text, data = write_landscape(record, tmp_path)
    html = page.read_text()
    assert html.count('<svg class="chart') == 4 + 2 * 3 + 3 * 3
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "normkit landscape --steps 6" in html
    assert "| none |" in text.read_text()
    assert len(json.loads(data.read_text())["traces"]) == 3
    first = page.read_bytes()
    write_landscape(record, tmp_path)
    assert page.read_bytes() == first


def test_a_diverging_run_is_told_and_the_others_go_on():
    found = run_landscape(replace(SMALL, methods=("none", "batch"), lr=1e4))
    assert found.traces[0].diverged
    assert found.traces[0].score is None
    assert table(found.traces, found.metric)[0][1][0] == "diverged"
    assert len(found.traces) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"methods": ("bach",)}, "did you mean 'batch'"),
        ({"methods": ()}, "--methods is empty"),
        ({"data": "nowhere/at/all"}, "--data"),
        ({"model": "vgg13"}, "vgg13"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(StudyError, match=message):
        run_landscape(replace(SMALL, **change))


def test_the_deep_linear_loss_is_that_of_the_paper():
    task = deep_linear_task(HowBNHelps(model="dln"), 1)
    model, optimizer = task.build("none")
    (batch,) = task.batches()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    product = torch.linalg.multi_dot([w.detach().double() for w in reversed(weights)])
    x, y = (t.double() for t in batch)
    assert len(weights) == 25
    assert x.shape == (1000, 10)
    assert task.objective(model, batch).item() == pytest.approx((x @ product.T - y).square().sum().item(), rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 1e-6


def test_the_walks_are_as_long_as_the_papers():
    assert DEEP_LINEAR["span"] == (1 / 100, 30)
    assert LandscapeConfig().span == (1 / 2, 4)


def test_a_diverged_run_does_not_set_the_scale():
    (_, _, panels), *_ = sections([trace("batch"), replace(trace("none", end=math.inf), losses=((1, 2.0), (2, 1e30)))])
    (loss,) = (panel.chart for panel in panels if panel.title == "Training loss")
    assert "none" in loss
    assert "e+" not in re.sub(r"aria-label=\"[^\"]*\"", "", loss)


def trace(method, *, end=1.0, band=1.0, change=1.0, beta=1.0, early=None, shift=0.1, drift=0.1, variance=0.1):
    betas = [early if early is not None else beta, beta, beta]
    records = tuple(
        {
            "step": k,
            "landscape": {"loss_low": 0.1, "loss_high": band, "change_low": 0.0, "change_high": change, "beta": b},
        }
        for k, b in enumerate(betas)
    )
    return Trace(
        method,
        ((1, 2.0), (2, end)),
        records,
        ((0, {"a": (shift, 0.9)}),),
        ((0, {"a": (drift, variance, drift, variance)}),),
        diverged=math.isinf(end),
    )


def verdicts(**changes):
    runs = {
        "none": {"end": 1.0, "band": 2.0, "change": 9.0, "beta": 9.0, "early": 99.0},
        "batch": {"end": 0.5, "shift": 0.2},
        "noisy-batch": {"end": 0.6, "drift": 0.5},
        "none+noise": {"end": math.inf},
        "l1": {"variance": 0.2},
        "l2": {"variance": 0.2},
        "linf": {"variance": 0.2},
    }
    for method, change in changes.items():
        runs[method.replace("_", "-")].update(change)
    return {f.claim: f.verdict for f in findings([trace(m, **v) for m, v in runs.items()], deep_linear=False)}


def test_the_papers_world_is_judged_reproduced():
    assert set(verdicts().values()) == {"reproduced"}


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"batch": {"band": 3.0}}, "loss varies less"),
        ({"batch": {"change": 10.0}}, "gradient changes less"),
        ({"none": {"early": 9.0}}, "early most of all"),
        ({"batch": {"shift": 0.05}}, "more internal covariate shift"),
        ({"noisy_batch": {"end": 0.9}}, "trains like batch"),
        ({"noisy_batch": {"drift": 0.05}}, "less stable"),
        ({"linf": {"beta": 8.0}}, "smooth like"),
        ({"l1": {"variance": 0.05}}, "shift more"),
    ],
)
def test_what_does_not_hold_is_said(change, claim):
    failed = [text for text, verdict in verdicts(**change).items() if verdict == "not reproduced"]
    assert any(claim in text for text in failed)


def test_a_moments_trace_ends_with_the_same_model_as_an_unwatched_run():
    task = deep_linear_task(HowBNHelps(model="dln"), 4)
    seen = train_and_measure(task, "batch", every=2, span=(0.5, 2))
    torch.manual_seed(0)
    model, optimizer = task.build("batch")
    losses = []
    for batch in task.batches():
        optimizer.zero_grad()
        loss = task.objective(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [loss for _, loss in seen.losses] == losses


@pytest.mark.slow
def test_the_command_writes_the_report(tmp_path, capsys):
    arguments = [
        "landscape",
        "--methods",
        "batch",
        "--steps",
        "2",
        "--every",
        "1",
        "--limit",
        "200",
        "--batch-size",
        "16",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "| batch |" in capsys.readouterr().out
    assert (tmp_path / "landscape.html").exists()
    assert main(["landscape", "--methods", "bach"]) == 2
    assert "did you mean 'batch'" in capsys.readouterr().err


def test_the_doctors_exit_code_says_healthy_or_not(tmp_path, capsys):
    assert main(["doctor", "--limit", "300", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    from normkit.study.models import build_model

    model = build_model("digits-cnn", input_shape=(1, 8, 8), classes=10)
    model[1].running_var[0] = math.nan
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    assert main(["doctor", "--limit", "300", "--checkpoint", str(tmp_path / "weights.pt")]) == 1
    assert "poisoned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere.pt"], "no such file"),
        (["--method", "bach"], "did you mean 'batch'"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--model", "vgg13"], "vgg13"),
    ],
)
def test_the_doctor_refuses_bad_input_in_one_line(arguments, message, capsys):
    assert main(["doctor", "--limit", "300", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, capsys):
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, message in (("other.pt", "keys differ"), ("text.pt", "cannot be read")):
        assert main(["doctor", "--limit", "300", "--checkpoint", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_experiment_is_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("normkit.study.papers.how_bn_helps.MEASUREMENTS", 1)
    monkeypatch.setattr(
        "normkit.study.papers.how_bn_helps.METHODS", ("none", "batch", "noisy-batch", "none+noise", "l1")
    )
    monkeypatch.setattr("normkit.study.papers.how_bn_helps.LP", ("l1",))
    arguments = ["reproduce", "how-bn-helps", "--model", "dln", "--scale", "0.0001", "--out", str(tmp_path)]
    assert main(arguments) == 0
    text = (tmp_path / "landscape.md").read_text()
    assert "On the deep linear network l_1 is best" in text
    assert "Scaled down: 1 steps instead of the paper's 10,000" in text
    assert "normkit reproduce how-bn-helps --model dln --scale 0.0001" in text
    assert main(["reproduce", "how-bn-helps", "--scale", "2"]) == 2
    assert "--scale 2" in capsys.readouterr().err
    assert main(["reproduce", "nothing"]) == 2
    assert "how-bn-helps" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_adds_the_landscape_to_its_report_and_keeps_it_in_the_store(tmp_path):
    arguments = ["compare", "--methods", "none,batch", "--batch-sizes", "16", "--seeds", "1", "--budget", "64"]
    arguments += ["--lr", "0.1", "--limit", "200", "--landscape", "--quiet", "--workers", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = (tmp_path / "report.html").read_text()
    assert "Effective beta-smoothness" in first
    traces = json.loads((tmp_path / "results.json").read_text())["record"]["landscape"]
    assert [trace["method"] for trace in traces] == ["none", "batch"]
    assert [record["step"] for record in traces[0]["records"]] == [0, 1, 2, 3]
    assert traces[0]["records"][0]["lr"] == 0.1
    assert main(["report", str(tmp_path)]) == 0
    assert "Effective beta-smoothness" in (tmp_path / "report.html").read_text()
