import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/surgery.md"


def test_the_code_of_the_page_runs_and_prints_what_it_says(capsys):
    page, names = PAGE.read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    (printed,) = re.findall(r"prints\n\n```\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == printed
    assert not any("Norm" in type(module).__name__ for module in names["deployed"].modules())
