"""Statistics of a study: score per method and batch size, differences paired by seed, and their noise.

Only final runs enter, and of them only those that finished. Runs that diverged or failed have no score: they are
counted beside the mean, and the seed is left out of the pairing for that method. No number is made up for them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
from scipy import stats

from normkit.study.records import Metric, State, StudyRecord, TrialResult
from normkit.study.report.rates import Rate, grids, is_at_edge

Alternative = Literal["two-sided", "greater"]
Equivalence = Literal["same", "no worse", "worse", "not decided"]

SIGNIFICANT = 0.05
CONFIDENCE = 0.95
EQUIVALENCE_CONFIDENCE = 0.90  # two one-sided tests at the 5 % level each
SECOND_REFERENCE = "group"  # beside ``batch``, where primary comparisons are named
PAIRS_FOR_A_CLAIM = 5
_ROUNDING = 1e-12  # of the largest score: differences that differ by less differ by rounding only


@dataclass(frozen=True)
class Paired:
    """Difference of a method to the reference over the seeds that both finished.

    Attributes:
        difference: Mean of (method - reference) over the pairs, in the unit of the score (of a fraction, 0.01 is one
            percentage point); what is better depends on the metric.
        low: Lower end of the 95 % t interval of that mean; None with a single pair, or where all differ by the same amount.
        high: Upper end, likewise.
        pairs: Number of seeds that both finished.
        p: p-value of the paired t test, uncorrected; None with fewer than five pairs, in an unfinished study, where the
            reference's learning rate is at the edge of its grid, and where all pairs differ by the same amount other than
            zero (no spread, hence no t statistic).
        p_holm: ``p`` corrected after Holm: over the methods compared at this batch size or, where primary comparisons were
            named, over all of them at all batch sizes.
        equivalence: What the 90 % interval says of the margin, see ``equivalence``; None without a margin or an interval, and
            where there would be no p-value either.
    """

    difference: float
    low: float | None
    high: float | None
    pairs: int
    p: float | None = None
    p_holm: float | None = None
    equivalence: Equivalence | None = None


@dataclass(frozen=True)
class Summary:
    """The final runs of one method at one batch size.

    Attributes:
        method: Method name.
        batch_size: Batch size.
        lr: Learning rate of the final runs; None before there is one.
        scores: Test score of each finished run, ordered by seed.
        diverged: Number of final runs whose loss became non-finite.
        failed: Number of final runs that ended with an error.
        gap: Mean train/eval gap of the finished runs; None where not measured.
        paired: Difference to the reference; None for the reference itself and where no seed is shared.
        second: Difference of a primary method to the second reference, see ``second_reference``; else None.
        at_edge: Whether ``lr`` is the lowest or highest of several rates that were searched.
        exploratory: Whether primary comparisons were named and the method is neither among them nor the reference.
    """

    method: str
    batch_size: int
    lr: float | None
    scores: tuple[float, ...]
    diverged: int
    failed: int
    gap: float | None
    paired: Paired | None = None
    second: Paired | None = None
    at_edge: bool = False
    exploratory: bool = False

    @property
    def runs(self) -> int:
        """Final runs that ended, however they ended."""
        return len(self.scores) + self.diverged + self.failed

    @property
    def mean(self) -> float | None:
        """Mean test score of the finished runs."""
        return float(np.mean(self.scores)) if self.scores else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of the test score (n - 1); None with fewer than two runs."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


def t_interval(
    differences: Sequence[float], confidence: float = CONFIDENCE, *, rounding: float = _ROUNDING
) -> tuple[float, float] | None:
    r"""Return the t interval of a mean, \(\bar d \pm t_{n-1} s / \sqrt n\).

    Args:
        differences: The n values.
        confidence: Coverage, in (0, 1).
        rounding: Spread that counts as none.

    Returns:
        Lower and upper end; None with fewer than two values, or where all are equal.

    >>> t_interval([1.0, 2.0, 3.0])
    (-0.484..., 4.484...)
    """
    if len(differences) < 2 or np.ptp(differences) <= rounding:
        return None
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def rounding_of(*scores: Sequence[float]) -> float:
    """Return what rounding can make of differences of scores."""
    return _ROUNDING * max((abs(score) for values in scores for score in values), default=0.0)


def paired_p_value(method: Sequence[float], reference: Sequence[float], alternative: Alternative) -> float | None:
    """p-value of the paired t test; 1 where all pairs are equal, None where they all differ by the same other amount.

    Args:
        method: One value per seed.
        reference: The reference's value for the same seeds.
        alternative: ``two-sided``, or ``greater`` for "the method is better than the reference".
    """
    differences = np.subtract(method, reference)
    rounding = rounding_of(method, reference)
    if np.ptp(differences) <= rounding:
        return 1.0 if abs(differences[0]) <= rounding else None
    return float(stats.ttest_rel(method, reference, alternative=alternative).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values after Holm (1979): the k-th smallest of m times m - k + 1, kept monotone, and capped at 1.

    Args:
        p_values: m p-values of one family of tests.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def equivalence(differences: Sequence[float], margin: float, *, rounding: float = _ROUNDING) -> Equivalence | None:
    """What two one-sided t tests say of a mean difference and a margin: where the 90 % interval lies.

    Args:
        differences: Method minus reference, signed so that higher is better.
        margin: Largest difference that counts as none.
        rounding: Spread of the differences that counts as none.

    Returns:
        ``same`` where the interval is within (-margin, margin), ``no worse`` where it is above -margin, ``worse`` where it is
        below -margin, else ``not decided``; None where there is no interval.

    >>> [equivalence([d - 0.01, d, d + 0.01], 0.05) for d in (0.0, 0.1, -0.1, 0.045, -0.045)]
    ['same', 'no worse', 'worse', 'no worse', 'not decided']
    """
    interval = t_interval(differences, EQUIVALENCE_CONFIDENCE, rounding=rounding)
    if interval is None:
        return None
    low, high = interval
    if low > -margin:
        return "same" if high < margin else "no worse"
    return "worse" if high < -margin else "not decided"


def direction(paired: Paired | None, metric: Metric, *, tested: bool) -> int:
    """Return 1 where a method is ahead of the reference beyond noise, -1 where behind, 0 where neither can be said.

    Args:
        paired: Its difference to the reference.
        metric: What is compared.
        tested: Whether there are p-values at this batch size. Then they decide, and a method without one is left out;
            otherwise the 95 % intervals decide, and the result is given as a measurement, not as a claim.
    """
    if paired is None or paired.low is None or paired.high is None:
        return 0
    beyond = paired.p_holm is not None and paired.p_holm < SIGNIFICANT if tested else paired.low > 0 or paired.high < 0
    return (1 if metric.signed(paired.difference) > 0 else -1) if beyond else 0


def margin_of(record: StudyRecord) -> float | None:
    """The margin of equivalence in the unit of the scores: a fraction where they are shown in percent."""
    margin = record.config.get("margin")
    return margin / 100 if margin is not None and record.metric.unit == "%" else margin


def is_exploratory(record: StudyRecord, method: str) -> bool:
    """Return whether primary comparisons were named and a method is neither among them nor the reference."""
    primary = record.config.get("primary")
    return bool(primary) and method not in {*primary, record.config["reference"]}


def second_reference(record: StudyRecord) -> str | None:
    """What the primary methods are compared with beside the reference: ``group``, where it is planned and not one of them."""
    planned = SECOND_REFERENCE in record.config["methods"] and is_exploratory(record, SECOND_REFERENCE)
    return SECOND_REFERENCE if planned else None


def finite(values: Iterable[float | None]) -> list[float]:
    """The values that are numbers: neither missing nor non-finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def unfinished(record: StudyRecord) -> bool:
    """Return whether trials of the plan are still to come; then nothing is claimed."""
    return record.planned > len(record.trials)


def plan_axes(record: StudyRecord) -> tuple[list[str], list[int]]:
    """Methods and batch sizes, in the order of the plan; what only the trials know comes last."""
    methods = dict.fromkeys([*record.config["methods"], *(trial.key.method for trial in record.trials)])
    sizes = dict.fromkeys([*record.config["batch_sizes"], *(trial.key.batch_size for trial in record.trials)])
    return list(methods), list(sizes)


def summarize(record: StudyRecord) -> list[Summary]:
    """Summaries of all methods at all batch sizes, also of those without a final run yet.

    Args:
        record: A study, finished or not.

    Returns:
        Batch size by batch size in the plan's order, within it method by method.
    """
    methods, sizes = plan_axes(record)
    tried = grids(record)
    finals = [trial for trial in record.trials if trial.key.phase == "final"]
    summaries = [
        summary
        for size in sizes
        for summary in _compare(
            {method: [t for t in finals if (t.key.method, t.key.batch_size) == (method, size)] for method in methods},
            size,
            record,
            tried,
        )
    ]
    return _corrected(summaries, record)


def _compare(
    trials: dict[str, list[TrialResult]],
    batch_size: int,
    record: StudyRecord,
    tried: dict[tuple[str, int], tuple[Rate, ...]],
) -> list[Summary]:
    """Summaries at one batch size, with p-values that are not corrected yet."""
    lr = {method: _only_lr(results) for method, results in trials.items()}
    at_edge = {method: is_at_edge(tried.get((method, batch_size), ()), lr[method]) for method in trials}
    scores = {method: _score_by_seed(results) for method, results in trials.items()}

    def compared(method: str, reference: str | None) -> Paired | None:
        if reference is None or method == reference:
            return None
        seeds = sorted(scores[method].keys() & scores.get(reference, {}).keys())
        claimed = not unfinished(record) and not at_edge.get(reference) and not is_exploratory(record, method)
        own, other = ([scores[m][seed] for seed in seeds] for m in (method, reference))
        return _paired(own, other, record, claimed=claimed) if seeds else None

    summaries = []
    for method, results in trials.items():
        states = Counter[State](trial.state for trial in results)
        gaps = finite(trial.train_eval_gap for trial in results if trial.state == "finished")
        summaries.append(
            Summary(
                method,
                batch_size,
                lr=lr[method],
                scores=tuple(scores[method][seed] for seed in sorted(scores[method])),
                diverged=states["diverged"],
                failed=states["failed"],
                gap=float(np.mean(gaps)) if gaps else None,
                paired=compared(method, record.config["reference"]),
                second=compared(
                    method, second_reference(record) if method in record.config.get("primary", ()) else None
                ),
                at_edge=at_edge[method],
                exploratory=is_exploratory(record, method),
            )
        )
    return summaries


def _paired(method: Sequence[float], reference: Sequence[float], record: StudyRecord, *, claimed: bool) -> Paired:
    """The difference of scores that stand seed by seed, with a p-value and equivalence where those are claimed."""
    differences = np.subtract(method, reference).tolist()
    rounding = rounding_of(method, reference)
    low, high = t_interval(differences, rounding=rounding) or (None, None)
    paired = Paired(float(np.mean(differences)), low, high, len(differences))
    if not claimed or len(differences) < PAIRS_FOR_A_CLAIM:
        return paired
    signed = record.metric.signed
    alternative = cast("Alternative", record.config.get("alternative", "two-sided"))
    margin = margin_of(record)
    return replace(
        paired,
        p=paired_p_value([*map(signed, method)], [*map(signed, reference)], alternative),
        equivalence=None if margin is None else equivalence([*map(signed, differences)], margin, rounding=rounding),
    )


def _corrected(summaries: Sequence[Summary], record: StudyRecord) -> list[Summary]:
    """The summaries with p-values corrected after Holm within each family."""
    families: dict[int, list[tuple[int, str, float]]] = {}
    for k, summary in enumerate(summaries):
        for field, paired in (("paired", summary.paired), ("second", summary.second)):
            if paired and paired.p is not None:
                family = 0 if record.config.get("primary") else summary.batch_size
                families.setdefault(family, []).append((k, field, paired.p))
    corrected = list(summaries)
    for family in families.values():
        for (k, field, _), p_holm in zip(family, holm([p for _, _, p in family]), strict=True):
            paired = replace(getattr(corrected[k], field), p_holm=p_holm)
            corrected[k] = replace(corrected[k], **{field: paired})
    return corrected


def _score_by_seed(trials: Iterable[TrialResult]) -> dict[int, float]:
    return {t.key.seed: t.test_score for t in trials if t.state == "finished" and t.test_score is not None}


def _only_lr(trials: Sequence[TrialResult]) -> float | None:
    rates = {trial.key.lr for trial in trials}
    if len(rates) > 1:
        key = trials[0].key
        raise ValueError(
            f"final runs of {key.method!r} at batch size {key.batch_size} have several learning rates {sorted(rates)}; "
            "their mean would mix them: start the study again in an empty folder"
        )
    return (rates.pop() or None) if rates else None  # 0 stands for: no learning rate worked
