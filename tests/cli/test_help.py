"""Help and lists: complete, and whole on a terminal of 80 columns."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys

import pytest

import normkit
from normkit.cli.main import COMMANDS, GROUPS, main
from normkit.cli.recipes import declared, listed
from normkit.study.config import StudyConfig

WIDTH = 80


def printed(capsys, *arguments):
    """What a command prints that ends with exit code 0."""
    with contextlib.suppress(SystemExit):
        main(list(arguments))
    out, errors = capsys.readouterr()
    assert errors == ""
    return out


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def test_the_list_of_recipes_is_what_the_methods_declare():
    assert listed() == declared(), "run `python -m normkit.cli.recipes`, which writes the list again"


def test_commands_are_listed_in_groups_and_fit_the_terminal(capsys):
    text = printed(capsys, "--help")
    for group, commands in GROUPS.items():
        assert re.search(rf"^{group}$", text, re.MULTILINE)
        assert all(re.search(rf"^  {name}  +\S", text, re.MULTILINE) for name in commands)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert printed(capsys, "help") == text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples_and_fits_the_terminal(name, capsys):
    text = printed(capsys, "help", *name.split())
    assert "Examples:\n  normkit " in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert printed(capsys, *name.split(), "--help") == text


def test_compare_lists_the_studys_own_options_first_and_the_others_under_headings(capsys):
    boxes = re.split(r"^[^\w\n]*((?:\w+ )?options)[^\w\n]*$", printed(capsys, "help", "compare"), flags=re.MULTILINE)[
        1:
    ]
    options = {
        heading: re.findall(r"^[│ ] {1,2}(--\w[\w-]+)", box, re.MULTILINE)
        for heading, box in zip(boxes[::2], boxes[1::2], strict=True)
    }
    others = ["selection options", "loading options", "training options", "execution options"]
    assert list(options) == ["options", *others]
    own = ["--task", "--data", "--model", "--methods", "--batch-sizes", "--budget", "--lr", "--seeds", "--out"]
    assert options["options"][: len(own)] == own
    listed = [name for names in options.values() for name in names]
    assert {name for name in listed if listed.count(name) > 1} == set()
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(StudyConfig)}
    assert fields - {"--higher-is-better"} <= set(listed)


@pytest.mark.parametrize("example", [line for kind in COMMANDS.values() for line in kind.examples])
def test_every_example_parses(example):
    from normkit.cli.main import parse

    program, *arguments = example.split()
    assert program == "normkit"
    assert type(parse(arguments)) in COMMANDS.values()


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_printed(option, capsys):
    assert printed(capsys, option) == f"normkit {normkit.__version__}\n"


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "normkit", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("normkit ")


def test_each_line_of_the_recipes_fits_the_terminal(capsys):
    assert max(map(len, printed(capsys, "recipes", "--all").splitlines())) <= WIDTH


def test_recipes_are_also_listed_as_json(capsys):
    entries = json.loads(printed(capsys, "recipes", "--all", "--json"))
    assert {entry["name"]: entry["summary"] for entry in entries} == {
        name: recipe.summary for name, recipe in normkit.recipes().items()
    }
    shown = json.loads(printed(capsys, "recipes", "--json"))
    assert [entry["name"] for entry in shown] == [entry["name"] for entry in entries if not entry["ablation"]]
