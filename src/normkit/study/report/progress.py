"""The display of a running study: a bar per method on a terminal, a line per trial elsewhere, nothing when quiet."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from normkit.study.plan import Slot
from normkit.study.records import ACCURACY, Metric, TrialKey, TrialResult
from normkit.study.report.format import format_duration, format_score

_RUNNING_SHOWN = 4


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
        self.planned: Sequence[Slot] = ()
        self._live: Live | None = None
        self._results: dict[TrialKey, TrialResult] = {}
        self._before: set[TrialKey] = set()
        self._running: Sequence[Slot] = ()
        self._start = clock()
        self._updated = False

    def plan(self, planned: Sequence[Slot]) -> None:
        """Say which trials the study has."""
        self.planned = planned

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
        """Estimated seconds to the end; None before a trial has ended.

        A trial is expected to take as long as those of its method and batch size did, else as those of its batch size.
        Before there is one, the nearest batch size stands in, scaled with the square root of the number of steps: more
        steps take longer, but larger ones do too. As many trials as so far are expected to run side by side.
        """
        by_cell: dict[tuple[str, int], list[float]] = defaultdict(list)
        by_size: dict[int, list[float]] = defaultdict(list)
        waiting: dict[tuple[str, int], int] = defaultdict(int)
        for slot in self.planned:
            waiting[slot.method, slot.batch_size] += 1
        for key, result in self._results.items():
            waiting[key.method, key.batch_size] -= 1
            by_cell[key.method, key.batch_size].append(result.seconds)
            by_size[key.batch_size].append(result.seconds)
        here = sum(result.seconds for key, result in self._results.items() if key not in self._before)
        if not by_size:
            return None
        elapsed = self.clock() - self._start
        work = 0.0
        for (method, size), count in waiting.items():
            near = min(by_size, key=lambda known: abs(math.log(known / size)))
            seconds = fmean(by_cell.get((method, size)) or by_size[near]) * math.sqrt(near / size)
            work += max(0, count) * seconds
        return work / max(1.0, here / elapsed if elapsed > 0 else 1.0)

    def _ending(self) -> str:
        left = self.seconds_left()
        return f", {format_duration(left)} left" if left else ""

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(width=30)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row("", "", "", Text("best so far, on validation", style="dim"))
        for method in dict.fromkeys(slot.method for slot in self.planned):
            mine = [result for result in self._results.values() if result.key.method == method]
            total = sum(slot.method == method for slot in self.planned)
            bar = ProgressBar(total=total, completed=len(mine), width=30)
            table.add_row(Text(method, style="bold"), bar, f"{len(mine)}/{total}", Text(best(mine, self.metric)))
        return Group(table, Text(self._status(), style="dim"))

    def _status(self) -> str:
        left = self.seconds_left()
        parts = [f"{format_duration(self.clock() - self._start)} so far"]
        if self._results and left:
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
    return f"{format_score(metric, score)} at batch size {key.batch_size}, lr {key.lr:.3g}"
