"""The committed figures are those that the command draws, and every card shows its own."""

import json
import re

import pytest

from benchmarks import figures
from tests.test_docs import DOCS, ROOT

IMAGES = ROOT / "docs" / "images"
DRAWN = sorted({file.stem.rpartition("-")[0] for file in IMAGES.glob("*.svg")})


@pytest.mark.parametrize("name", DRAWN)
def test_a_committed_figure_is_what_its_results_give(name, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    figures.main([name])
    for theme in ("light", "dark"):
        assert (tmp_path / f"{name}-{theme}.svg").read_text() == (IMAGES / f"{name}-{theme}.svg").read_text()


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_shown_in_light_and_dark(name):
    shown = {target for page in DOCS for target in re.findall(r"\]\(images/(\S+?)\)", page.read_text())}
    assert {f"{name}-light.svg#only-light", f"{name}-dark.svg#only-dark"} <= shown


def test_a_figure_without_results_is_named_and_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr(figures, "FINE_TUNING", ROOT / "nowhere.jsonl")
    figures.main(["fine-tuning"])
    assert capsys.readouterr().out == "fine-tuning: no nowhere.jsonl yet\n"
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_shows_each_method_at_its_best_rate(monkeypatch, tmp_path):
    runs = [
        {"target": "colours", "method": method, "batch_size": size, "lr": lr, "seed": seed, "finite": True}
        | {"start": 40.0, "best": base + 10 * (lr == 0.1) + seed, "validation": [base, base + 10 * (lr == 0.1)]}
        for method, base in (("batch", 30.0), ("group", 50.0))
        for size in (4, 1)
        for lr in (0.01, 0.1)
        for seed in (0, 1)
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    monkeypatch.setattr(figures, "FINE_TUNING", tmp_path / "runs.jsonl")
    chart = figures.fine_tuning("colours")
    assert "batch: 40.5 at 4, 40.5 at 1. group: 60.5 at 4, 60.5 at 1." in chart


def test_the_online_figure_shows_the_mean_over_the_streams_that_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "STREAMED", ("batch", "group+ws"))
    runs = [
        {"method": method, "images": 3200, "lr": 0.1, "seed": seed, "windows": [base + 10 * seed] * 31 + [base]}
        for method, base in (("batch", 10), ("group+ws", 30), ("none", 90))
        for seed in (0, 1, 2)
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    monkeypatch.setattr(figures, "ONLINE", tmp_path / "runs.jsonl")
    chart = figures.online()
    assert "batch: 25 at 100, " in chart
    assert "45 at 3,100, 30 at 3,200." in chart
    assert "none" not in chart
