"""What a study shows while it runs: the plan, then a bar per method on a terminal, a line per trial elsewhere."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normkit.study.config import StudyConfig
from normkit.study.plan import Slot, slots
from normkit.study.records import ACCURACY, Cost, Metric, TrialKey, TrialResult
from normkit.study.report.format import enumerate_words, format_duration, format_score, pluralize

_RUNNING_SHOWN = 4
_FEW_STEPS = 20
_BAR = range(8, 31)  # widths of a bar
_GAP = 2  # between columns


def expected_seconds(config: StudyConfig, costs: Sequence[Cost]) -> dict[tuple[str, int], float]:
    """Seconds that a final trial of each method and batch size takes, from the measured time of a step.

    Args:
        config: The study.
        costs: What its methods cost; those that could not be measured are left out.
    """
    return {
        (cost.method, cost.batch_size): cost.step_seconds * math.ceil(config.budget / cost.batch_size)
        for cost in costs
        if cost.step_seconds is not None
    }


def plan_text(config: StudyConfig, task: str, model: str, folder: Path) -> str:
    """Say what a study will run, how many trials, and where its report will be.

    Args:
        config: The study.
        task: The data in one line.
        model: The model, in a word.
        folder: The output folder.
    """
    planned = slots(config)
    finals = sum(slot.phase == "final" for slot in planned)
    sizes = enumerate_words(config.batch_sizes)
    named = [f"named beforehand: {', '.join(config.primary)}; the others are exploratory"] if config.primary else []
    return "\n".join([
        f"methods: {', '.join(config.methods)}",
        *named,
        f"{model} on {task}",
        f"batch size{'s' if len(config.batch_sizes) > 1 else ''} {sizes}, {config.budget:,} training samples a trial",
        *_few_steps(config),
        f"{pluralize(len(planned), 'trial')}: {len(planned) - finals} to search learning rates{_more(config)}, {finals} final",
        f"report: {folder / 'report.html'}",
    ])


def _few_steps(config: StudyConfig) -> list[str]:
    size = max(config.batch_sizes)
    steps = math.ceil(config.budget / size)
    remedy = (
        f"that is {pluralize(steps, 'step')} at batch size {size}, in which networks learn little: raise the budget"
    )
    return [remedy] if steps < _FEW_STEPS else []


def _more(config: StudyConfig) -> str:
    grows = config.lr == "auto" and config.lr_points > 1 and config.lr_extend
    return " (more where the best rate lies at an end of its grid)" if grows else ""


def time_text(config: StudyConfig, expected: Mapping[tuple[str, int], float], workers: int) -> str:
    """Say about how long a study will take.

    Args:
        config: The study.
        expected: What ``expected_seconds`` returned.
        workers: Trials that run side by side.
    """
    search = config.budget_of("search") / config.budget
    took = sum((search if s.phase == "search" else 1) * expected.get(s.cell, 0.0) for s in slots(config)) / workers
    return f"about {format_duration(took)} of training, {pluralize(workers, 'trial')} side by side"


class Display:
    """Context manager that shows how far a study is; ``update`` may be called as often as one likes.

    Args:
        console: Where to write; default standard output.
        quiet: Show nothing.
        metric: What the scores are.
        clock: Seconds since some start.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        metric: Metric = ACCURACY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.quiet, self.metric = quiet, metric
        self.clock = clock
        self._config: StudyConfig | None = None
        self.planned: Sequence[Slot] = ()
        self._live: Live | None = None
        self._results: dict[TrialKey, TrialResult] = {}
        self._before: set[TrialKey] = set()
        self._running: Sequence[Slot] = ()
        self._start = clock()
        self._updated = False
        self._expected: Mapping[tuple[str, int], float] = {}
        self._workers = 1
        self._least_left = math.inf

    def plan(
        self,
        planned: Sequence[Slot],
        expected: Mapping[tuple[str, int], float] | None = None,
        workers: int = 1,
        config: StudyConfig | None = None,
    ) -> None:
        """Say which trials the study has.

        Args:
            planned: The trials.
            expected: Seconds that a final one takes, by method and batch size, as far as known.
            workers: Trials that run side by side.
            config: The study, whose searches may add trials.
        """
        self.planned, self._config = planned, config
        self._expected, self._workers = expected or {}, workers

    def __enter__(self) -> "Display":
        self._start = self.clock()
        if not self.quiet and self.console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def write(self, text: str) -> None:
        """Show one line of text."""
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=True)

    def update(self, results: Sequence[TrialResult], running: Sequence[Slot]) -> None:
        """Take in where the study is; results of the first call are those of an earlier start.

        Args:
            results: All trials that ended.
            running: Trials that some worker has begun.
        """
        new = [result for result in results if result.key not in self._results]
        self._results |= {result.key: result for result in new}
        self._running = running
        if self._config and any(result.key.phase == "search" for result in new):  # which may add to the plan
            grown = slots(self._config, results)
            if len(grown) > len(self.planned):
                self.planned, self._least_left = grown, math.inf
        if not self._updated:
            self._updated = True
            self._before = set(self._results)
            if new:
                self.write(f"resuming: {len(new)} of {len(self.planned)} trials are done")
        elif self._live is None:
            done = len(self._results) - len(new)
            for place, result in enumerate(new, done + 1):
                self.write(
                    f"[{place}/{len(self.planned)}] {describe(result.key)}: {outcome(result, self.metric)}{self._ending()}"
                )

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None while nothing is known.

        A trial is expected to take as long as those of its method and batch size did. Before one has ended, its measured
        steps say how long it takes, scaled as the trials that have ended were. Where there are none, trials of the nearest
        batch size stand in, scaled with the square root of the number of steps: more steps take longer, but larger ones do
        too. As many trials as so far are expected to run side by side.
        """
        by_cell: dict[tuple[str, int], list[float]] = defaultdict(list)
        by_size: dict[int, list[float]] = defaultdict(list)
        waiting: dict[tuple[str, int], float] = defaultdict(float)  # counted in final trials
        config = self._config or StudyConfig()
        share = {"search": config.budget_of("search") / config.budget, "final": 1.0}
        for slot in self.planned:
            waiting[slot.cell] += share[slot.phase]
        for key, result in self._results.items():
            waiting[key.method, key.batch_size] -= share[key.phase]
            by_cell[key.method, key.batch_size].append(result.seconds / share[key.phase])
            by_size[key.batch_size].append(result.seconds / share[key.phase])
        here = sum(result.seconds for key, result in self._results.items() if key not in self._before)
        pairs = [(fmean(took), self._expected[cell]) for cell, took in by_cell.items() if cell in self._expected]
        slower = sum(took for took, _ in pairs) / max(sum(steps for _, steps in pairs), 1e-9) if pairs else 1.0
        elapsed = self.clock() - self._start
        work = 0.0
        for cell, count in waiting.items():
            if cell in by_cell:
                seconds = fmean(by_cell[cell])
            elif cell in self._expected:
                seconds = self._expected[cell] * slower
            elif by_size:
                size = cell[1]
                near = min(by_size, key=lambda known: abs(math.log(known / size)))
                seconds = fmean(by_size[near]) * math.sqrt(near / size)
            else:
                return None
            work += max(0.0, count) * seconds
        return work / max(self._workers, here / elapsed if elapsed > 0 else 1.0)

    def _shown_left(self) -> float | None:
        """The estimate as it is shown: it waits for a slower one rather than rise."""
        left = self.seconds_left()
        if left is None:
            return None
        self._least_left = min(self._least_left, left)
        return self._least_left

    def _ending(self) -> str:
        left = self._shown_left()
        return f", {format_duration(left)} left" if left else ""

    def _table(self) -> RenderableType:
        rows: list[tuple[str, int, int, str]] = []
        for method in dict.fromkeys(slot.method for slot in self.planned):
            mine = [result for result in self._results.values() if result.key.method == method]
            total = sum(slot.method == method for slot in self.planned)
            rows.append((method, len(mine), total, best(mine, self.metric)))
        heading = "best so far, on validation" if any(row[3] for row in rows) else ""
        others = [
            max((len(method) for method, *_ in rows), default=0),
            max((len(f"{done}/{total}") for _, done, total, _ in rows), default=0),
            max((len(text) for *_, text in rows), default=0),
        ]
        room = self.console.width - sum(others) - 4 * _GAP
        width = min(max(room, _BAR.start), _BAR.stop - 1)
        table = Table.grid(padding=(0, _GAP))
        for justify in ("left", "left", "right", "left"):
            table.add_column(justify=justify, no_wrap=True)
        if heading:
            table.add_row("", "", "", Text(heading, style="dim"))
        for method, done, total, text in rows:
            bar = ProgressBar(total=total, completed=done, width=width)
            table.add_row(Text(method, style="bold"), bar, f"{done}/{total}", Text(text))
        return Group(table, Text(self._status(), style="dim"))

    def _status(self) -> str:
        left = self._shown_left()
        parts = [f"{len(self._results)} of {pluralize(len(self.planned), 'trial')}"]
        parts.append(f"{format_duration(self.clock() - self._start)} so far")
        if left:
            parts.append(f"about {format_duration(left)} left")
        lost = sum(result.state in {"diverged", "failed"} for result in self._results.values())
        if lost:
            parts.append(f"{lost} diverged or failed")
        names = [describe(slot) for slot in self._running[:_RUNNING_SHOWN]]
        more = len(self._running) - len(names)
        if names:
            parts.append(f"running: {', '.join(names)}{f' and {more} more' if more else ''}")
        return " · ".join(parts)


def describe(key: TrialKey | Slot) -> str:
    """A trial in a few words.

    >>> describe(TrialKey("final", "group", 8, 0.1, 2)), describe(TrialKey("search", "group", 8, 0.1, 1_000_000))
    ('group, batch size 8, lr 0.1, seed 2', 'group, batch size 8, search at lr 0.1')
    """
    rate = f"lr {key.lr:.3g}" if key.lr is not None else "lr to be chosen"
    return f"{key.method}, batch size {key.batch_size}, " + (
        f"search at {rate}" if key.phase == "search" else f"{rate}, seed {key.seed}"
    )


def outcome(result: TrialResult, metric: Metric = ACCURACY) -> str:
    """Describe in a few words how a trial ended."""
    if result.state != "finished":
        return f"{result.state}{f' ({result.error})' if result.error else ''}"
    split = "validation" if result.test_score is None else "test"
    score = result.validation_score if result.test_score is None else result.test_score
    reached = f"{format_score(metric, score)} on {split}" if score is not None else "finished"
    return f"{reached} in {format_duration(result.seconds)}"


def best(results: Sequence[TrialResult], metric: Metric = ACCURACY) -> str:
    """The best validation score among the results and where it was reached; empty without one."""
    scored = [(r.validation_score, r.key) for r in results if r.validation_score is not None]
    if not scored:
        return ""
    score, key = max(scored, key=lambda pair: metric.signed(pair[0]))
    return f"{format_score(metric, score)} at batch {key.batch_size}, lr {key.lr:.3g}"
