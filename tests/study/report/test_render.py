import csv
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from normkit.study.records import CurvePoint
from normkit.study.report.render import CSV_COLUMNS, read_results, render_html, render_markdown, write_report
from normkit.study.report.statistics import summarize
from tests.study.report.fake_study import METHODS, realistic, record, result

HOSTILE = "<script>alert(1)</script>\"'`|&{{ 7 * 7 }}"


def html_of(record):
    return render_html(record, summarize(record))


def markdown_of(record):
    return render_markdown(record, summarize(record))


class Tags(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that are not closed in order."""

    void = frozenset({"meta", "link", "br", "hr", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"closes {tag} that is not open"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def only(phase, trials):
    return tuple(t for t in trials if t.key.phase == phase)


def all_diverged():
    return record([
        result(method=m, size=s, seed=k, state="diverged") for m in METHODS for s in (8, 1) for k in range(2)
    ])


def hostile():
    whole = realistic(
        methods=("batch", HOSTILE),
        sizes=(8, 1),
        data=HOSTILE,
        model=HOSTILE,
        data_summary=HOSTILE,
    )
    failed = result("final", HOSTILE, 8, 0.02, 99, state="failed", error=f"boom {HOSTILE}")
    return dataclasses.replace(
        whole,
        trials=(*whole.trials, failed),
        command=f"normkit compare --model {HOSTILE}",
        environment={HOSTILE: HOSTILE},
        recipes={HOSTILE: {"summary": HOSTILE, "paper": HOSTILE}},
        planned=len(whole.trials) + 1,
    )


PARTIAL = {
    "whole": realistic,
    "five seeds": lambda: realistic(seeds=5),
    "one-sided": lambda: realistic(seeds=5, alternative="greater"),
    "no trials": lambda: record([], planned=60),
    "search only": lambda: dataclasses.replace(realistic(), trials=only("search", realistic().trials)),
    "finals only": lambda: dataclasses.replace(realistic(), trials=only("final", realistic().trials)),
    "half way": lambda: dataclasses.replace(realistic(), trials=realistic().trials[:40]),
    "no costs": lambda: dataclasses.replace(realistic(), costs=()),
    "one method": lambda: realistic(methods=("group",)),
    "one batch size": lambda: realistic(sizes=(1,)),
    "one seed": lambda: realistic(seeds=1),
    "one trial": lambda: record([result()], ["batch"], [64], seeds=1),
    "all diverged": all_diverged,
    "all failed": lambda: record([result(state="failed", error="out of memory")], ["batch"], [64]),
    "reference diverged": lambda: record(
        [result(method="batch", state="diverged"), result(method="group", accuracy=0.9)], ["batch", "group"], [64]
    ),
    "twenty methods": lambda: realistic(methods=("batch", *(f"method-{k}" for k in range(19)))),
    "non-finite loss": lambda: record([result(curve=(CurvePoint(10, float("nan")), CurvePoint(20, float("inf"))))]),
    "all pruned": lambda: record([result("search", state="pruned", error="below the median")], planned=9),
    "hostile": hostile,
}


@pytest.mark.parametrize("study", PARTIAL.values(), ids=PARTIAL.keys())
def test_every_stage_of_a_study_makes_a_well_formed_report(study, tmp_path):
    files = write_report(study(), tmp_path / "new" / "folder")
    assert [path.name for path in files] == ["report.html", "report.md", "results.json", "trials.csv"]
    page = Tags(files[0].read_text(encoding="utf-8"))
    assert page.tags.count("h1") == 1
    assert "script" not in page.tags
    assert "nan" not in " ".join(value or "" for name, value in page.attributes if name in {"d", "transform"})
    json.loads(files[2].read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_same_record_gives_the_same_bytes(tmp_path):
    first, second = write_report(realistic(), tmp_path / "a"), write_report(realistic(), tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_page_refers_to_nothing_outside():
    page = Tags(html_of(realistic()))
    links = [value for name, value in page.attributes if name in {"href", "src", "srcset", "xlink:href", "action"}]
    assert links == ["data:,"]
    assert "url(" not in html_of(realistic())
    assert "@import" not in html_of(realistic())


def test_figures_have_a_text_that_tells_their_numbers():
    labels = [value for name, value in Tags(html_of(realistic())).attributes if name == "aria-label"]
    assert any("Test accuracy against batch size" in label and "batch: 95.8 % at 64" in label for label in labels)
    assert any("Training loss" in label for label in labels)
    assert any("Validation accuracy against learning rate" in label for label in labels)


def test_hostile_names_are_text_everywhere():
    page = Tags(html_of(hostile()))
    text = "".join(page.text)
    assert "script" not in page.tags
    assert text.count("<script>alert(1)</script>") >= 10
    assert "{{ 7 * 7 }}" in text


def test_hostile_names_keep_markdown_tables_whole():
    columns, rows = 0, 0
    for line in markdown_of(hostile()).replace("\\|", "").splitlines():
        if line.startswith("| method"):
            columns = line.count("|")
        elif line.startswith("| `<script>"):
            rows += 1
            assert line.count("|") == columns
    assert rows > 2


def test_results_give_the_record_back(tmp_path):
    for name in ("whole", "hostile", "all diverged"):
        study = PARTIAL[name]()
        assert read_results(write_report(study, tmp_path)[2]) == study


def test_csv_has_one_line_per_trial_with_these_columns(tmp_path):
    study = hostile()
    path = write_report(study, tmp_path)[3]
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == tuple(name.replace("_score", "_accuracy") for name in CSV_COLUMNS)
    assert len(rows) == len(study.trials)
    for row, trial in zip(rows, study.trials, strict=True):
        assert row["method"] == trial.key.method
        assert float(row["lr"]) == pytest.approx(trial.key.lr)
        assert row["test_accuracy"] == ("" if trial.test_score is None else str(trial.test_score))


def test_p_column_appears_from_five_seeds_up():
    assert "Holm" not in markdown_of(realistic(seeds=4))
    assert "p, Holm" in markdown_of(realistic(seeds=5))


def test_columns_without_a_value_are_left_out():
    assert "memory" in markdown_of(realistic())
    assert "memory" not in markdown_of(dataclasses.replace(realistic(), costs=()))
    assert "difference to" not in markdown_of(realistic(methods=("bnp",)))


def test_diverged_runs_are_told_in_verdict_table_figure_and_list():
    page = html_of(realistic())
    assert "Diverged, and left out of the means: <code>batch-renorm</code> at batch size 1 in 1 of 3 runs." in page
    assert "diverged 1 of 3" in page
    assert 'class="cross' in page
    assert "loss became non-finite at example 512" in page


def test_data_is_told_in_a_line_or_by_its_name():
    assert "269 validation" in html_of(realistic())
    assert "269 validation" in markdown_of(realistic())
    assert "- Data `digits`" in markdown_of(realistic(data_summary=None))


def test_a_study_of_best_weights_says_so_with_place_and_cost():
    trials = [
        dataclasses.replace(result(seed=seed), best_step=step, seconds=10.0, validation_seconds=0.5)
        for seed, step in enumerate((12, 18, 24))
    ]
    study = record(trials, methods=("batch",), sizes=(64,), best_weights=True)  # 24 steps of 64 make 1,500 examples
    for page in (html_of(study).replace("\N{NO-BREAK SPACE}", " "), markdown_of(study)):
        assert "best checkpoint by validation accuracy" in page
        assert "after 50 to 100 % of the steps (median 75 %)" in page
        assert "The extra validation took 5.0 % of the time" in page
        assert "best checkpoint" not in markdown_of(dataclasses.replace(study, config=realistic().config))


def test_rates_given_for_each_method_are_told():
    rates = {"batch": 0.1, "group": 0.2}
    assert "&#39;group&#39;: 0.2" in html_of(realistic(lr=rates))


def test_the_time_that_all_runs_took_is_told():
    study = record([result(seed=seed) for seed in range(60)], methods=("batch",), sizes=(64,))  # of 1.25 s each
    for page in (html_of(study), markdown_of(study)):
        assert "60 runs, which took 1 min 15 s one after the other." in page
    assert "one after the other" not in markdown_of(record([], planned=3))


def test_the_thread_that_steps_are_timed_on_is_told_for_a_cpu():
    for render in (html_of, markdown_of):
        assert "in turns" in render(realistic(device="cuda"))
        assert "on one thread" in render(realistic(device="cpu"))
        assert "on one thread" not in render(realistic(device="cuda"))


def test_crosses_and_markers_of_the_first_point_stay_clear_of_the_labels_of_the_axis():
    trials = [result(method=m, size=s, state="diverged") for m in ("batch", "group", "none") for s in (8, 1)]
    page = html_of(record([*trials, result(method="layer", size=8)], sizes=(8, 1)))
    chart = re.search(r'<svg class="chart wide".*?</svg>.*?</svg>', page, re.DOTALL)
    assert chart is not None
    places = re.findall(r'class="(?:cross|mark) c\d" transform="translate\(([0-9.]+) ', chart[0])
    assert len(places) == 7
    assert min(map(float, places)) >= 46  # where the axis begins, left of which its labels stand


@pytest.mark.parametrize(("share", "examples"), [(0.5, "750"), (300.0, "300"), (0.01, "64")])
def test_a_search_with_less_than_the_budget_says_so(share, examples):
    assert f"Search runs saw {examples} examples, final runs 1,500." in markdown_of(realistic(search_budget=share))
    assert f"Search runs saw {examples} examples" in html_of(realistic(search_budget=share))
    for whole in (realistic(), realistic(search_budget=1.0), PARTIAL["finals only"]()):
        assert "Search runs saw" not in markdown_of(whole)


def test_a_study_of_divided_batches_says_so():
    whole = realistic()
    divided = dataclasses.replace(whole, config={**whole.config, "micro_batch": 8})
    assert "Batches are divided into micro-batches of 8, whose gradients accumulate." in markdown_of(divided)
    assert "of 8 samples; gradients accumulate" in Tags(html_of(divided)).text
    assert "micro-batch" not in (markdown_of(whole) + html_of(whole)).lower()
