"""The examples of tasks in the documentation are compared from end to end."""

from pathlib import Path

import pytest

from normkit.study.compare import compare
from normkit.study.config import StudyConfig
from normkit.study.load import load_task

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "tasks"
METHODS = {
    "volumes": ("batch", "instance", "bnp"),
    "regression": ("batch", "none"),
    "detection": ("batch", "group", "bnp"),
    "lightning_module": ("batch", "bnp"),
    "sequences": ("batch", "batchless"),
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(METHODS)


@pytest.mark.parametrize("example", METHODS)
def test_an_example_is_compared_and_reported_in_its_own_words(example, tmp_path):
    if example == "lightning_module":
        pytest.importorskip("lightning.pytorch")
    place = f"{EXAMPLES / example}.py:task"
    size = 2 if example == "volumes" else 8
    config = StudyConfig(task=place, methods=METHODS[example], batch_sizes=(size,), budget=24, seeds=1, lr=0.01)
    task = load_task(place)
    record, folder = compare(config, tmp_path / "out", task=task)
    assert {trial.state for trial in record.trials} == {"finished"}
    assert all(trial.test_score is not None for trial in record.trials)
    assert all(cost.step_ratio is not None for cost in record.costs)
    columns = (folder / "trials.csv").read_text().splitlines()[0].split(",")
    assert {"validation_score", "test_score"} < set(columns)
    text = (folder / "report.md").read_text()
    assert f"test {task.metric}" in text
    assert ("lower is better" in text) != task.higher_is_better
    assert "accuracy" not in text


def test_the_examples_import_nothing_private():
    for path in EXAMPLES.glob("*.py"):
        assert "normkit.study" not in path.read_text()
