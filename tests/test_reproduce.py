"""Presets: what they are, what is scaled down, and that a run puts our figures beside the paper's."""

import pytest

import evenkeel
from evenkeel.cli import main
from evenkeel.study.models import build_model
from evenkeel.study.plan import StudyConfig, validate
from evenkeel.study.presets import PRESETS, scaled
from evenkeel.study.reproduce import listing, reproduce

SHAPES = {"digits": (1, 8, 8), "spiral": (2,)}
ROWS = [pytest.param(row, id=f"{name}: {row.label}") for name, preset in PRESETS.items() for row in preset.rows]


@pytest.mark.parametrize("row", ROWS)
def test_every_preset_is_a_study_that_can_be_run(row):
    validate(row.config)
    validate(scaled(row.config, 0.001)[0])
    assert set(row.published) <= set(row.config.methods) <= set(evenkeel.recipes())


@pytest.mark.parametrize(
    "model", sorted({row.config.model for p in PRESETS.values() for row in p.rows if "wrn" in row.config.model})
)
def test_wide_networks_are_named_with_the_papers_dropout(model):
    assert model.endswith(("-0.3", "-0.4"))
    small = "-".join(["wrn-10-1", model.split("-")[-1]])
    assert build_model(small, input_shape=(3, 32, 32), classes=10) is not None


def test_published_figures_are_those_of_the_papers_table():
    vgg13 = PRESETS["riemannian-cifar10"].rows[0]
    assert dict(vgg13.published) == {"batch": 94.12, "sgd-g": 94.13, "adam-g": 93.95}
    last = PRESETS["riemannian-svhn"].rows[-1]
    assert dict(last.published) == {"batch": 98.36, "sgd-g": 98.37, "adam-g": 98.45}


def test_the_listing_has_every_preset_with_its_cost():
    text = listing()
    assert all(name in text for name in [*PRESETS, "how-bn-helps"])
    assert "120 runs, 1,200 million training examples" in text


def test_the_full_scale_changes_nothing():
    config = PRESETS["batchless-cifar10"].rows[0].config
    assert scaled(config, 1.0) == (config, [])


def test_scaling_down_keeps_the_protocol_and_says_what_is_less():
    config = PRESETS["batchless-cifar10"].rows[0].config
    small, less = scaled(config, 0.001)
    assert small.budget == 3000
    assert small.batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128)
    assert (small.methods, small.optimizer, small.schedule, small.model) == (
        *(config.methods, config.optimizer, config.schedule, config.model),
    )
    assert less[0] == "3,000 of 3,000,000 training examples a run"
    assert any("batch sizes 1, 2" in line for line in less)


def test_adam_moves_the_grid_of_methods_that_use_it_only():
    from evenkeel.study.plan import learning_rates

    config = StudyConfig(optimizer="adam", lr_points=1)
    assert learning_rates(config, "batch", 64) == [0.001]
    assert learning_rates(config, "batchless-adam", 64) == [0.001]
    assert learning_rates(config, "sgd-g", 64) == [0.2]


def test_a_run_puts_our_figures_beside_the_papers(tmp_path, monkeypatch):
    monkeypatch.setitem(
        PRESETS,
        "tiny",
        PRESETS["how-bn-helps-accuracy"].__class__(
            "A small one", "Someone 2020", (PRESETS["how-bn-helps-accuracy"].rows[0],), "Not a paper."
        ),
    )
    monkeypatch.setattr("evenkeel.study.presets.SMALLEST_BUDGET", 64)
    changes = {"data": "digits", "methods": ("none", "batch"), "seeds": 2, "model": "digits-cnn", "batch_sizes": (16,)}
    text = reproduce(
        "tiny", scale=0.00001, out=tmp_path, changes=changes, workers=1, quiet=True, arguments=["reproduce", "tiny"]
    )
    assert (tmp_path / "reproduce.md").read_text() == text
    row = next(line for line in text.splitlines() if "| batch |" in line)
    assert row.endswith("| 83.00 |")
    assert "| 0, 1 |" in row
    assert "64 of 1,920,000 training examples a run" in text
    assert "published figures are those of full training" in text
    assert "evenkeel reproduce tiny" in text


def test_bad_input_is_one_line(capsys):
    assert main(["reproduce", "riemanian-cifar10"]) == 2
    assert "did you mean 'riemannian-cifar10'?" in capsys.readouterr().err
    assert main(["reproduce", "batchless-spiral", "--scale", "2"]) == 2
    assert "--scale 2.0" in capsys.readouterr().err
    assert main(["reproduce", "how-bn-help"]) == 2
    assert "did you mean 'how-bn-helps" in capsys.readouterr().err
