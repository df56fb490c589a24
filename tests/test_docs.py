"""What the documents promise."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from normkit.cli.main import main
from normkit.study.report.render import read_results

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


PARAGRAPHS = [
    pytest.param(paragraph, id=f"{card}, {paragraph.splitlines()[0]}")
    for card in ("bnp", "bnp-langevin", "batchless", "how-bn-helps", "revisited", "riemannian")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{card}.md").read_text(), re.DOTALL)
    for paragraph in block.split("\n\n")
]


@pytest.mark.parametrize("paragraph", PARAGRAPHS)
def test_each_paragraph_of_a_cards_code_runs_on_a_model_of_yours(paragraph):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    x, y = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
    names = {"torch": torch, "normkit": normkit, "F": F, "model": model, "x": x, "y": y, "batch": (x, y)}
    names |= {"some_batches": [x], "examples": 8, "prior": lambda model: 0.0}
    names |= {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    names |= {"objective": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}
    exec(paragraph, names)
    assert names["model"](x).isfinite().all()  # it runs, and leaves a model that does


@pytest.mark.parametrize("name", normkit.recipes())
def test_every_recipe_has_a_card(name):
    assert any(f"`{name}`" in page.read_text() for page in DOCS)


def test_what_stands_for_a_paper_cites_it():
    plain = {"apply", "convert", "describe", "doctor", "fold", "functional", "instruments", "moments", "param_groups"}
    plain |= {"handle", "recalibrate", "recipes", "revert", "scale_invariance"}
    papers = [getattr(normkit, name) for name in normkit.__all__ if name not in plain]
    assert [o.__name__ for o in papers if not re.search(r"arXiv \d|J\. Mach\. Learn\.", o.__doc__)] == []
    assert [name for name in normkit.functional.__all__ if f"``{name}``" not in normkit.functional.__doc__] == []


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS if page.name not in text] == []


def test_the_readme_is_at_most_6_kb():
    assert len((ROOT / "README.md").read_bytes()) <= 6 * 1024


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_example_with_an_own_model_and_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = "compare --data docs/examples/own.py:data --model docs/examples/own.py:model --methods none,batch,bnp"
    assert command in (ROOT / "docs/compare.md").read_text()
    quick = "--batch-sizes 32 --seeds 2 --budget 320 --lr-points 2 --quiet --out"
    assert main([*command.split(), *quick.split(), str(tmp_path / "out")]) == 0
    finals = [t for t in read_results(tmp_path / "out" / "results.json").trials if t.key.phase == "final"]
    assert {t.state for t in finals} == {"finished"}


@pytest.mark.slow
def test_the_example_on_volumes_finds_their_ellipsoids(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["volumes.py", "bnp", "0.03"])
    runpy.run_path(str(ROOT / "docs/examples/volumes.py"), run_name="__main__")
    assert float(re.search(r"bnp, lr 0.03: Dice ([\d.]+)", capsys.readouterr().out)[1]) > 0.85
