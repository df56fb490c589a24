"""The same command in another version meets its study, or is told by name why it cannot."""

import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest

from normkit.cli.main import main
from normkit.study.config import StudyConfig
from normkit.study.errors import StudyError
from normkit.study.folder import StudyFolder
from normkit.study.identity import FORMAT, pack, study_name, unpack
from normkit.study.report.render import read_results

KEPT = Path(__file__).parent / "kept"  # a study of format 2, and the name of its configuration today
CONFIG = StudyConfig(model="digits-cnn", methods=("batch",), batch_sizes=(32,), seeds=1, lr=0.1, budget=96)
COMMAND = [
    "compare",
    "--model",
    "digits-cnn",
    "--methods",
    "batch",
    "--batch-sizes",
    "32",
    "--seeds",
    "1",
    "--lr",
    "0.1",
    "--budget",
    "96",
    "--quiet",
]


@pytest.fixture
def kept(tmp_path):
    """The kept study, as a folder."""
    (tmp_path / "study.json").write_text((KEPT / "study.json").read_text())
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.executescript((KEPT / "study.sql").read_text())
    database.close()
    return tmp_path


def test_a_study_of_this_format_is_named_as_it_always_was():
    assert study_name(CONFIG) == json.loads((KEPT / "name.json").read_text())


def test_the_same_command_on_a_kept_study_trains_nothing_and_reports_what_it_had(kept, monkeypatch):
    def refuse(*_):
        raise AssertionError("a trial was run")

    monkeypatch.setattr("normkit.study.compare.run_workers", lambda address, config, count, progress: None)
    monkeypatch.setattr("normkit.study.compare.measure_costs", refuse)  # the costs are kept too
    assert main([*COMMAND, "--out", str(kept)]) == 0
    (trial,) = read_results(kept / "results.json").trials
    assert trial.state == "finished"
    assert trial.seconds == pytest.approx(json.loads((KEPT / "study.json").read_text())["seconds"])


def test_an_option_at_its_default_is_no_part_of_a_study_s_name(monkeypatch):
    before = study_name(CONFIG)
    later = dataclasses.make_dataclass(
        "StudyConfig", [("newer", int, dataclasses.field(default=0))], bases=(StudyConfig,), frozen=True
    )
    monkeypatch.setattr("normkit.study.identity.StudyConfig", later)
    same = later(**vars(CONFIG))
    assert study_name(same) == before
    assert pack(same) == pack(CONFIG)
    assert study_name(dataclasses.replace(same, newer=1)) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"options": {"seeds": 2, "newer": 1}, "version": "9.9"},
            "made by normkit 9.9 with the option newer, .* update normkit",
        ),
        ({"format": FORMAT + 1, "version": "9.9"}, f"made by normkit 9.9 with format {FORMAT + 1}, .* update normkit"),
        ({"revisions": {"batch": 3}}, "batch trained otherwise when it began"),
        ({"options": 5}, "is damaged"),
    ],
)
def test_what_this_version_cannot_resume_is_refused_by_name(kept, change, message, capsys):
    text = json.loads((kept / "study.json").read_text())
    text["study"] |= change
    (kept / "study.json").write_text(json.dumps(text))
    before = {path: path.read_bytes() for path in kept.iterdir()}
    assert main([*COMMAND, "--out", str(kept)]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in before} == before


def test_a_revision_other_than_the_first_is_part_of_the_name(monkeypatch):
    import normkit

    before = study_name(CONFIG)
    revised = dict(normkit.recipes())
    revised["batch"] = dataclasses.replace(revised["batch"], revision=2)
    monkeypatch.setattr("normkit.study.identity.recipes", lambda: revised)
    assert study_name(CONFIG) != before
    with pytest.raises(StudyError, match="batch trained otherwise"):
        unpack({**pack(CONFIG), "revisions": {}}, "it")


def test_a_study_from_before_formats_is_found_under_the_name_it_has(tmp_path):
    import hashlib

    options = CONFIG.to_dict()
    del options["prune"]  # an option that came later
    (tmp_path / "study.json").write_text(json.dumps({"config": options, "command": "normkit compare", "storage": None}))
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:10]
    assert StudyFolder.read(tmp_path).config == CONFIG
    assert StudyFolder(tmp_path, CONFIG, "", None).prepare().name == f"digits-digits-cnn-{digest}"


@pytest.mark.parametrize("former", [True, False])
def test_a_study_of_a_revised_method_is_reported_and_not_resumed(kept, monkeypatch, capsys, former):
    import normkit

    if former:  # before formats
        name = json.loads((KEPT / "study.json").read_text())["name"]
        kept_options = {"config": CONFIG.to_dict(), "command": "normkit compare", "storage": None, "name": name}
        (kept / "study.json").write_text(json.dumps(kept_options))
    revised = dict(normkit.recipes())
    revised["batch"] = dataclasses.replace(revised["batch"], revision=2)
    monkeypatch.setattr("normkit.study.identity.recipes", lambda: revised)
    assert main([*COMMAND, "--out", str(kept)]) == 2
    assert "batch trained otherwise when it began" in capsys.readouterr().err
    assert main(["report", str(kept)]) == 0
    assert len(read_results(kept / "results.json").trials) == 1
