import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from normkit.study.config import StudyConfig
from normkit.study.plan import Slot, slots
from normkit.study.records import Cost
from normkit.study.report.format import format_duration
from normkit.study.report.progress import Display, best, expected_seconds, outcome, plan_text, time_text
from normkit.study.report.terminal import render_terminal
from tests.study.report.fake_study import realistic, record, result


def slot(trial):
    return Slot(**dataclasses.asdict(trial.key))


def console(terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


@pytest.fixture
def trials():
    return realistic().trials[:6]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_no_terminal_gets_one_plain_line_per_trial(trials):
    out = console(terminal=False)
    with Display(out) as display:
        display.plan([slot(t) for t in trials])
        display.update([], [])
        display.update(trials[:1], [slot(trials[1])])
        display.update(trials[:1], [slot(trials[1])])
        display.update(trials[:3], [])
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("[1/6] batch, batch size 64, search at lr 0.01: ")
    assert "\x1b" not in out.file.getvalue()


def test_terminal_shows_a_bar_per_method_the_best_so_far_and_what_runs():
    study = realistic()
    out = console(terminal=True, width=140)
    clock = Clock()
    with Display(out, clock=clock) as display:
        display.plan([slot(t) for t in study.trials])
        display.update([], [])
        clock.now = 20.0
        display.update(study.trials[:30], [slot(t) for t in study.trials[30:36]])
    text = out.file.getvalue()
    assert "batch" in text
    assert "21/21" in text
    assert "9/21" in text
    assert "% at batch " in text
    assert "20 s so far" in text
    assert "and 2 more" in text


def test_quiet_shows_nothing(trials):
    for terminal in (True, False):
        out = console(terminal)
        with Display(out, quiet=True) as display:
            display.plan([slot(t) for t in trials])
            display.update([], [])
            display.update(trials, [])
            display.write("hello")
        assert out.file.getvalue() == ""


def test_trials_of_an_earlier_start_are_told_once_and_do_not_speed_up_the_estimate(trials):
    out, clock = console(terminal=False), Clock()
    with Display(out, clock=clock) as display:
        display.plan([slot(t) for t in trials])
        display.update(trials[:4], [])
        clock.now = 5.0
        assert display.seconds_left() == pytest.approx(2 * 1.25)
    assert out.file.getvalue() == "resuming: 4 of 6 trials are done\n"


def test_time_left_scales_from_the_nearest_batch_size_until_one_is_known():
    planned = [result(size=size, seed=seed) for size in (64, 1) for seed in range(4)]
    clock = Clock()
    display = Display(console(terminal=False), clock=clock, quiet=True)
    display.plan([slot(t) for t in planned])
    with display:
        display.update([], [])
        assert display.seconds_left() is None
        clock.now = 1.0
        display.update(planned[:4], [])
        assert display.seconds_left() == pytest.approx(4 * 1.25 * (64 / 1) ** 0.5 / 5.0)
        slow = dataclasses.replace(planned[4], seconds=10.0)
        clock.now = 7.5  # 15 s of work in 7.5 s: two side by side
        display.update([*planned[:4], slow], [])
        assert display.seconds_left() == pytest.approx(3 * 10.0 / 2)


def test_markup_in_names_is_text():
    trial = result(method="[red]x[/red]", error="[bold]boom[/nonsense]", state="failed")
    for terminal in (True, False):
        out = console(terminal)
        with Display(out) as display:
            display.plan([slot(trial)])
            display.update([], [])
            display.update([trial], [slot(trial)])
            display.write("[/x]")
        assert "[red]x[/red]" in out.file.getvalue()


def test_an_error_in_the_study_stops_the_display_and_goes_on():
    out = console(terminal=True)
    display = Display(out)
    with pytest.raises(KeyboardInterrupt), display:
        raise KeyboardInterrupt
    assert out.file.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_lost_trials_are_told_with_their_error():
    assert outcome(result(state="failed", error="out of memory")) == "failed (out of memory)"
    assert best([result(state="diverged")]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (86400, "24 h 00 min")]
)
def test_durations_round_to_the_next_unit(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("width", [60, 80, 140])
def test_terminal_report_has_verdict_and_every_method(width):
    out = console(terminal=False, width=width)
    out.print(render_terminal(realistic(seeds=5)))
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "At batch size 1 group reached" in " ".join(text.split())
    for method in ("batch", "group", "layer", "batch-renorm", "none"):
        assert text.count(f" {method} ") >= 3


def test_terminal_report_gives_the_reason_of_failed_runs():
    lost = [result("final", "batch", 1, 0.1, seed, 0.0, "failed", error="ValueError: one value") for seed in range(2)]
    out = console(terminal=False)
    out.print(render_terminal(record([*lost, result("final", "group", 1, 0.1, 0, 0.9)], planned=3)))
    assert "2 final runs of batch at batch size 1 failed: ValueError: one value" in out.file.getvalue()


def test_terminal_report_of_an_empty_study_says_so():
    out = console(terminal=False)
    out.print(render_terminal(record([], planned=9)))
    assert "No final run has ended yet" in out.file.getvalue()
    assert "0 of 9 trials" in out.file.getvalue()


def test_the_plan_says_what_runs_how_many_trials_and_where_to():
    config = StudyConfig(methods=("batch", "none"), batch_sizes=(64, 8), seeds=2, budget=640, lr_points=3)
    text = plan_text(config, "digits: 1078 training", "digits-cnn", Path("runs/digits"))
    assert "methods: batch, none\n" in text
    assert "beforehand" not in text
    named = plan_text(dataclasses.replace(config, primary=("none",)), "", "", Path())
    assert named.splitlines()[1] == "named beforehand: none; the others are exploratory"
    assert "digits-cnn on digits: 1078 training" in text
    assert (
        f"{len(slots(config))} trials: 12 to search learning rates (more where the best rate lies at an end of its grid), 8 final"
        in text
    )
    assert str(Path("runs/digits/report.html")) in text
    assert "10 steps at batch size 64, in which networks learn little: raise the budget" in text
    assert "learn little" not in plan_text(dataclasses.replace(config, budget=1280), "", "", Path())
    costs = [Cost("batch", 64, step_seconds=0.1), Cost("batch", 8, step_seconds=0.01), Cost("none", 8, error="no")]
    expected = expected_seconds(config, costs)
    assert expected == {("batch", 64): pytest.approx(1.0), ("batch", 8): pytest.approx(0.8)}
    assert time_text(config, expected, 2) == "about 4.5 s of training, 2 trials side by side"
    assert time_text(config, expected, 1).endswith(", 1 trial side by side")


def test_time_left_is_known_from_the_start_where_steps_were_measured():
    planned = [slot(result(size=size, seed=seed)) for size in (64, 1) for seed in range(4)]
    display = Display(console(terminal=False), clock=Clock(), quiet=True)
    display.plan(planned, {("batch", 64): 1.0, ("batch", 1): 10.0}, workers=2)
    assert display.seconds_left() == pytest.approx(4 * (1.0 + 10.0) / 2)
    display.update([], [])
    display.update([result(size=64, seed=0)], [])  # it took 1.25 times as long as its steps
    assert display.seconds_left() == pytest.approx((3 * 1.25 + 4 * 12.5) / 2)


def test_the_time_left_that_is_shown_does_not_rise():
    trials = [result(seed=seed, accuracy=0.9) for seed in range(9)]
    trials[1:] = [dataclasses.replace(trial, seconds=9.0) for trial in trials[1:]]  # the first was quick
    out, clock = console(terminal=False), Clock()
    with Display(out, clock=clock) as display:
        display.plan([slot(t) for t in trials])
        display.update([], [])
        for done in range(1, len(trials)):
            clock.now += trials[done - 1].seconds
            display.update(trials[:done], [])
    left = [float(found) for found in re.findall(r"([\d.]+) s left", out.file.getvalue())]
    assert len(left) == 8
    assert left == sorted(left, reverse=True)


def test_the_live_display_is_whole_at_80_columns():
    study = realistic(methods=("batch", "batchless-projected", "normalizer-free"), sizes=(64, 8, 1))
    out = console(terminal=True, width=80)
    with Display(out, clock=Clock()) as display:
        display.plan([slot(t) for t in study.trials])
        display.update([], [])
        display.update(study.trials[:-1], [slot(study.trials[-1])])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue())
    assert "…" not in text
    for method, done in (("batch", "21/21"), ("batchless-projected", "21/21"), ("normalizer-free", "20/21")):
        assert re.search(rf"{method} .* {done}  [\d.]+ % at batch \d+, lr [\d.]+", text)


def test_the_terminal_report_has_time_and_memory_at_80_columns():
    out = console(terminal=False, width=80)
    out.print(render_terminal(realistic(seeds=5)))
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("time") == text.count("memory") == 3
    assert text.count("× 1.62") >= 6
