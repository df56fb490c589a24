"""Presets: what they are, what is scaled down, and that a run puts our figures beside the paper's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import normkit
from normkit.cli.main import main
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.methods import parse_method
from normkit.study.models import build_model
from normkit.study.papers.presets import PRESETS
from normkit.study.papers.reproduce import find, preset_list, reproduce
from normkit.study.papers.scaling import scaled
from normkit.study.plan import validate
from normkit.study.report.format import format_p
from normkit.study.report.render import read_results
from normkit.study.report.statistics import summarize

ROOT = Path(__file__).parents[3]
SHAPES = {"digits": (1, 8, 8), "spiral": (2,)}
ROWS = [pytest.param(row, id=f"{name}: {row.label}") for name, preset in PRESETS.items() for row in preset.comparisons]


@pytest.mark.parametrize("row", ROWS)
def test_every_preset_is_a_study_that_can_be_run(row):
    validate(row.config)
    validate(scaled(row.config, 0.001)[0])
    assert set(row.published) <= {*row.config.methods, *row.rates}
    assert {parse_method(method)[0] for method in (*row.config.methods, *row.rates)} <= set(normkit.recipes())


@pytest.mark.parametrize(
    "model", sorted({row.config.model for p in PRESETS.values() for row in p.comparisons if "wrn" in row.config.model})
)
def test_wide_networks_are_named_with_the_papers_dropout(model):
    assert model.endswith(("-0.3", "-0.4"))
    small = "-".join(["wrn-10-1", model.split("-")[-1]])
    assert build_model(small, input_shape=(3, 32, 32), classes=10) is not None


ERRORS = """
    cifar10   vgg13 5.88/5.87/6.05     vgg19 6.49/5.92/6.02     wrn-28-10 3.89/3.85/3.78     wrn-40-10 3.72/3.72/3.80
    cifar100  vgg13 26.17/25.29/24.89  vgg19 27.62/25.79/25.59  wrn-28-10 18.66/18.19/18.30  wrn-40-10 18.39/18.04/17.85
    svhn      vgg13 1.78/1.74/1.72     vgg19 1.94/1.81/1.77     wrn-16-4 1.64/1.67/1.61      wrn-22-8 1.64/1.63/1.55
"""


@pytest.mark.parametrize("line", ERRORS.split("\n")[1:-1], ids=lambda line: line.split()[0])
def test_published_figures_are_those_of_the_papers_table(line):
    data, *cells = line.split()
    rows = PRESETS[f"riemannian-{data}"].comparisons
    assert [row.label for row in rows] == cells[::2]
    for row, errors in zip(rows, cells[1::2], strict=True):
        expected = [pytest.approx(100 - float(error)) for error in errors.split("/")]
        for methods in (("batch", "sgd-g-paper", "adam-g-paper"), row.config.methods):
            assert [row.published[method] for method in methods] == expected


def test_published_figures_of_vgg_are_those_with_and_without_batch_normalization():
    plain, augmented = PRESETS["how-bn-helps-accuracy"].comparisons
    assert (plain.config.flip, plain.published) == (False, {"batch": 83, "none": 80})
    assert (augmented.config.flip, augmented.published) == (True, {"batch": 92, "none": 88})


def test_the_listing_has_every_preset_with_its_cost():
    text = preset_list()
    assert all(name in text for name in [*PRESETS, "how-bn-helps"])
    assert "at least 96 runs, 960 million training examples" in text
    assert "at least 36 runs, 292 million training examples; with --paper-rates 30 runs, 243 million" in text


def test_the_full_scale_changes_nothing():
    config = PRESETS["batchless-cifar10"].comparisons[0].config
    assert scaled(config, 1.0) == (config, {})


@pytest.mark.parametrize("row", ROWS)
def test_no_scale_leaves_a_last_batch_of_one_sample(row):
    sizes = (128, 60, 16, 3)
    for scale in (1e-5, 0.00123, 0.0333, 0.4567, 0.777):
        validate(scaled(row.config, scale)[0])
        small = scaled(replace(row.config, batch_sizes=sizes), scale)[0]
        assert all(small.budget % size != 1 for size in sizes)


def test_scaling_down_keeps_the_protocol_and_says_what_is_less():
    config = PRESETS["batchless-cifar10"].comparisons[0].config
    small, less = scaled(config, 0.001)
    assert small.budget == 2400
    assert small.batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128)
    assert (small.methods, small.optimizer, small.schedule, small.model) == (
        *(config.methods, config.optimizer, config.schedule, config.model),
    )
    assert less["budget"] == "2,400 of 2,400,000 training examples a run"
    assert less["batch_sizes"].startswith("batch sizes 1, 2, 4")


def test_adam_moves_the_grid_of_methods_that_use_it_only():
    from normkit.study.plan import learning_rates

    config = StudyConfig(optimizer="adam", lr_points=1)
    assert learning_rates(config, "batch", 64) == [0.001]
    assert learning_rates(config, "batchless-adam", 64) == [0.001]
    assert learning_rates(config, "sgd-g", 64) == [0.2]


@pytest.mark.slow
def test_a_run_puts_our_figures_beside_the_papers(tmp_path, monkeypatch):
    monkeypatch.setitem(
        PRESETS,
        "tiny",
        PRESETS["how-bn-helps-accuracy"].__class__(
            "A small one", "Someone 2020", (PRESETS["how-bn-helps-accuracy"].comparisons[0],), "Not a paper."
        ),
    )
    monkeypatch.setattr("normkit.study.papers.scaling.SMALLEST_BUDGET", 64)
    changes = {"data": "digits", "methods": ("none", "batch"), "seeds": 2, "model": "digits-cnn", "batch_sizes": (16,)}
    text, _ = reproduce(
        "tiny", scale=0.00001, out=tmp_path, changes=changes, workers=1, quiet=True, arguments=["reproduce", "tiny"]
    )
    assert (tmp_path / "reproduce.md").read_text() == text
    row = next(line for line in text.splitlines() if "| batch |" in line)
    assert row.endswith("| 83.00 |")
    assert "| 0, 1 |" in row
    assert "64 of 1,920,000 training examples a run" in text
    assert "of 3 seeds" not in text  # as many as were asked for
    assert "--seeds 2" in text
    assert "--methods none,batch" in text
    assert "published figures are those of full training" in text
    assert "normkit reproduce tiny" in text


def test_bad_input_is_one_line(capsys):
    assert main(["reproduce", "riemanian-cifar10"]) == 2
    assert "did you mean 'riemannian-cifar10'?" in capsys.readouterr().err
    assert main(["reproduce", "batchless-spiral", "--scale", "2"]) == 2
    assert "--scale 2.0" in capsys.readouterr().err
    assert main(["reproduce", "how-bn-help"]) == 2
    assert "did you mean 'how-bn-helps" in capsys.readouterr().err


def test_the_revisited_preset_is_the_papers_protocol():
    preset = PRESETS["revisited-cifar10"].at_paper_rates()
    (row,) = preset.comparisons
    config = row.config
    assert (config.data, config.model, config.seeds, config.alternative) == ("cifar10", "resnet18", 15, "greater")
    assert (config.validation, config.budget, config.batch_sizes) == (0.1, 180 * 45_000, (128,))
    assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.schedule, config.warm_up, config.flip, config.crop) == ("cosine", 0.0, True, 0)
    assert config.best_weights
    assert config.reference == "revisited-decay"  # their baseline has their groups: norms and biases are not decayed
    assert config.lr == {"revisited-decay": 0.1, "revisited": 0.1}
    assert preset.runs == 30


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("riemannian-cifar100", {"batch": 0.1, "sgd-g-paper": 0.2, "adam-g-paper": 0.05}),
        ("riemannian-svhn", {"batch": 0.01, "sgd-g-paper": 0.02, "adam-g-paper": 0.005}),
    ],
)
def test_the_riemannian_presets_have_the_papers_rates_and_drops(name, rates):
    for row in PRESETS[name].at_paper_rates().comparisons:
        assert row.config.lr == rates
        assert row.config.methods == tuple(rates)
        assert row.config.schedule == ("two-step" if name.endswith("svhn") else "step")
        assert (row.config.weight_decay, row.config.optimizer) == (5e-4, "nesterov")


def test_svhn_trains_on_all_its_images_as_they_are():
    (row,) = find("riemannian-svhn", model="vgg13").comparisons
    config = row.config
    assert (config.train_split, config.scaling, config.crop, config.flip) == ("train+extra", "unit", 0, False)
    assert config.budget == 160 * 604_388
    assert config.model == "vgg13-dense"
    (cifar,) = find("riemannian-cifar10", model="vgg13").comparisons
    assert (cifar.config.train_split, cifar.config.scaling, cifar.config.crop) == ("train", "standardized", 4)


def test_the_batchless_preset_is_the_authors_protocol():
    (row,) = PRESETS["batchless-cifar10"].at_paper_rates().comparisons
    config = row.config
    arms = [parse_method(method)[1].get("scale") for method in config.methods]
    assert arms == [None, None, "log", "abs", "inv"]
    assert set(config.lr.values()) == {1e-3}
    assert (config.optimizer, config.scaling, config.best_weights, config.validation) == (
        "adam",
        "symmetric",
        True,
        0.2,
    )
    assert config.budget == 60 * 40_000
    assert {parse_method(method)[1].get("samples") for method in config.methods[2:]} == {1000}


def test_batch_normalization_of_the_batchless_network_is_refused_at_batch_size_one():
    """So that the report has no figure there, as the paper has none."""
    model = build_model("batchless-cnn", input_shape=(3, 8, 8), classes=3)
    model, _ = normkit.apply("batch+input", model, lr=0.1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model.train()(torch.rand(1, 3, 8, 8))


def test_the_sweeps_reach_the_values_on_either_side_of_the_papers():
    rows = PRESETS["revisited-sweep"].comparisons
    scales, divisors = ([parse_method(m)[1] for m in row.config.methods if ":" in m] for row in rows)
    assert [min(values) for values in ([s["scale"] for s in scales], [d["scale_lr_divisor"] for d in divisors])] == [
        0.01,
        1,
    ]
    assert [max(values) for values in ([s["scale"] for s in scales], [d["scale_lr_divisor"] for d in divisors])] == [
        1,
        1000,
    ]
    assert {row.config.reference for row in rows} == {"revisited-decay"}


def test_input_normalization_is_tried_alone_and_against_every_other_scaling():
    rows = PRESETS["revisited-input"].comparisons
    assert [row.config.scaling for row in rows] == ["standardized", "symmetric", "unit"]
    assert "batch+input" in rows[0].config.methods


def test_the_two_rates_of_the_landscape_paper_are_presets_and_an_option():
    from normkit.study.config import HowBNHelps
    from normkit.study.papers import how_bn_helps

    assert [row.config.lr for row in PRESETS["how-bn-helps-rates"].comparisons] == [0.1, 0.5]
    with pytest.raises(StudyError, match=r"--lr 0\.5: is that of the VGG"):
        how_bn_helps.reproduce(HowBNHelps(model="dln", lr=0.5))


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_of_presets_says_of_each_what_departs_from_the_paper(name):
    page = " ".join((ROOT / "docs/presets.md").read_text(encoding="utf-8").split())
    assert f"## `{name}`" in page
    sentences = re.split(r"(?<=\.) ", PRESETS[name].note)
    assert [sentence for sentence in sentences if sentence not in page] == []  # the page states once what presets share


def test_the_fair_arm_decays_the_same_weights_for_every_method():
    (row,) = find("riemannian-cifar10", model="vgg13").comparisons
    decayed = set()
    for method in row.config.methods:
        model = build_model("resnet20", input_shape=(3, 32, 32), classes=10)
        _, optimizer = normkit.apply(method, model, lr=0.1, weight_decay=row.config.weight_decay)
        decayed.add(tuple(g["name"] for g in optimizer.param_groups if g["weight_decay"]))
    assert decayed == {("weights",)}


def test_a_network_is_chosen_among_those_of_a_preset_with_its_published_figures():
    (row,) = find("riemannian-cifar10", model="wrn-28-10").comparisons
    assert (row.config.model, row.published["sgd-g"]) == ("wrn-28-10-0.3", 96.15)
    with pytest.raises(StudyError, match=r"--model resnet20: .*choose one of vgg13, vgg19, wrn-28-10, wrn-40-10"):
        find("riemannian-cifar10", model="resnet20")


def test_another_network_takes_the_place_of_the_only_one_without_its_figures():
    rows = find("how-bn-helps-accuracy", model="vgg19", paper_rates=True).comparisons
    assert [(row.label, row.config.model) for row in rows] == [("vgg19", "vgg19"), ("vgg19, augmented", "vgg19")]
    assert not any(row.published for row in rows)
    assert rows[0].config.lr["l1"] == 0.1


def test_rates_that_are_not_known_are_not_invented():
    with pytest.raises(StudyError, match="--paper-rates: the learning rates of batchless-spiral are not known"):
        find("batchless-spiral", paper_rates=True)
    options = {"workers": 1, "quiet": True, "arguments": []}
    with pytest.raises(StudyError, match="--paper-rates: revisited-cifar10 has no learning rate for bnp"):
        reproduce("revisited-cifar10", scale=1, out=None, changes={"methods": ("bnp",)}, paper_rates=True, **options)


@pytest.mark.slow
def test_at_the_papers_rates_nothing_is_searched_and_the_page_has_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr("normkit.study.papers.scaling.SMALLEST_BUDGET", 64)
    changes = {
        "data": "digits",
        "batch_sizes": (16,),
        "methods": ("revisited-decay", "revisited"),
        "seeds": 5,
        "flip": False,
    }
    text, _ = reproduce(
        "revisited-pieces",
        scale=0.00001,
        out=tmp_path,
        changes=changes,
        model="digits-cnn",
        paper_rates=True,
        workers=1,
        quiet=True,
        arguments=["reproduce", "revisited-pieces", "--paper-rates"],
    )
    record = read_results(tmp_path / "digits-cnn" / "results.json")
    assert {(t.key.phase, t.key.lr) for t in record.trials} == {("final", 0.1)}
    assert "at the learning rate that the paper gives it" in text
    assert "learning rates" not in text.split("## What was scaled down")[1].split("## Data")[0]
    paired = next(s.paired for s in summarize(record) if s.method == "revisited")
    assert "p (greater, Holm)" in text
    assert "--model digits-cnn" in text
    assert f"| {format_p(paired.p_holm)} | 0.1 |" in next(line for line in text.splitlines() if "| revisited |" in line)
    assert "best checkpoint by validation accuracy" in text
    assert "900 training, 100 validation" in text
