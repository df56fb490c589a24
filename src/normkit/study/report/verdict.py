"""The verdict: one sentence a person would say about a study, beside the caveats that belong to it.

Method names stand in backticks, so that each kind of report can set them in its own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from normkit.study.records import Metric, StudyRecord
from normkit.study.report.caveats import caveats, progress
from normkit.study.report.format import (
    difference_unit,
    enumerate_words,
    format_difference,
    format_score,
    pluralize,
    quoted,
)
from normkit.study.report.statistics import Summary, direction

_NEAR_CHANCE = 1.5  # a fraction below 1.5 times chance level is called that
_FELL = 0.1  # lost against the reference's own best batch size, where the score is a fraction
_NAMED = 3  # longer lists of methods are counted, not read out


@dataclass(frozen=True)
class Verdict:
    """What a study says.

    Attributes:
        sentence: The finding, in one sentence.
        caveats: Sentences that complete and limit it, see ``normkit.study.report.caveats``.
    """

    sentence: str
    caveats: tuple[str, ...] = ()


def reach_verdict(record: StudyRecord, summaries: Sequence[Summary]) -> Verdict:
    """Say what the study found.

    Args:
        record: A study, finished or not.
        summaries: Its summaries, see ``normkit.study.report.statistics.summarize``.
    """
    ran = [summary for summary in summaries if summary.runs]
    if not ran:
        return Verdict("No final run has ended yet, so there is nothing to compare.", progress(record))
    below = caveats(record, ran)
    if not any(summary.scores for summary in ran):
        return Verdict("No final run finished: every one diverged or failed.", below)
    named = [summary for summary in ran if not summary.exploratory]
    if not named:
        return Verdict("No final run of a primary method has ended yet.", below)
    sentence = _alone(named, record.metric) if len({s.method for s in named}) == 1 else _compared(record, named)
    return Verdict(sentence[0].upper() + sentence[1:] + ".", below)


def _name(summary: Summary) -> str:
    return quoted(summary.method)


def _scored(summary: Summary, metric: Metric, base: Summary | None = None) -> str:
    shared = "" if base is None else _on_shared_seeds(summary, base, metric)
    score = "" if summary.mean is None else format_score(metric, summary.mean)
    details = "; ".join(filter(None, (score, shared)))
    return _name(summary) + (f" ({details})" if details else "")


def _on_shared_seeds(summary: Summary, base: Summary, metric: Metric) -> str:
    """The paired difference, where runs without a score make the means stand for other seeds than it; else nothing."""
    paired = summary.paired
    if paired is None or paired.pairs == len(summary.scores) == len(base.scores):
        return ""
    unit = difference_unit(metric)
    apart = f"{format_difference(metric, paired.difference)}{f' {unit}' if unit else ''}"
    return f"{apart} on {pluralize(paired.pairs, 'shared seed')}"


def _alone(ran: Sequence[Summary], metric: Metric) -> str:
    reached = [f"{format_score(metric, s.mean)} at batch size {s.batch_size}" for s in ran if s.mean is not None]
    return f"{_name(ran[0])} reached {enumerate_words(reached)}, with no other method to compare it to"


def _leaning(others: Sequence[Summary], metric: Metric, sign: int) -> list[Summary]:
    tested = any(s.paired and s.paired.p_holm is not None for s in others)
    return [s for s in others if direction(s.paired, metric, tested=tested) == sign]


def _compared(record: StudyRecord, ran: Sequence[Summary]) -> str:
    """Describe the largest difference in full, then in brief where else a method is ahead, none is, or all are level."""
    reference, chance = record.config["reference"], record.config["chance"]
    metric = record.metric
    best = max((s.mean for s in ran if s.method == reference and s.mean is not None), default=0.0, key=metric.signed)
    one_sided = record.config.get("alternative") == "greater"
    none = "no primary method" if record.config.get("primary") else "no method"
    level = f"{none} {'is shown to be better than' if one_sided else 'differs from'} `{reference}` beyond the noise"
    ahead: list[tuple[float, int, str, str]] = []  # how much, batch size, in full, in brief
    behind: list[tuple[float, int, str, str]] = []
    rest: dict[str, list[int]] = {}
    for size in dict.fromkeys(summary.batch_size for summary in ran):
        here = sorted((s for s in ran if s.batch_size == size), key=lambda s: -metric.signed(s.mean or 0.0))
        base = next((s for s in here if s.method == reference), None)
        others = [s for s in here if s is not base and s.mean is not None]
        if base and others and base.at_edge:
            text = f"no claim is made, since the best learning rate of {_name(base)} lies at the edge of its grid"
            rest.setdefault(text, []).append(size)
        elif base and others and (found := _ahead(others, base, metric, best, chance)):
            ahead.append((found[0], size, *found[1:]))
        elif base and others and (found := _behind(others, base, metric, none)):
            behind.append((found[0], size, *found[1:]))
        elif any(s.paired and s.paired.low is not None for s in here):
            rest.setdefault(level, []).append(size)
        else:
            text = _unmeasured([s for s in here if s.mean is not None], metric)
            rest.setdefault(text, []).append(size)
    clauses: list[tuple[list[int], str]] = []
    for _, size, full, brief in sorted(ahead, reverse=True):
        clauses.append(([size], brief if clauses else full))
    for _, size, full, brief in sorted(behind, reverse=True):
        if clauses:
            rest.setdefault(brief, []).append(size)
        else:
            clauses.append(([size], full))
    clauses += [(sizes, text) for text, sizes in rest.items()]
    sizes, text = clauses[0]
    first = f"at batch {'size' if len(sizes) == 1 else 'sizes'} {enumerate_words(sizes)} {text}"
    return "; ".join([first, *(f"at {enumerate_words(sizes)} {text}" for sizes, text in clauses[1:])])


def _unmeasured(seen: Sequence[Summary], metric: Metric) -> str:
    """Describe what methods, best first, reached where there is no measure of the noise."""
    if len(seen) > _NAMED:
        return f"{metric.name} ranges from {_scored(seen[-1], metric)} to {_scored(seen[0], metric)}"
    words = [f"{_name(s)}{'' if k else ' reached'} {format_score(metric, s.mean or 0.0)}" for k, s in enumerate(seen)]
    return enumerate_words(words) if words else "no run finished"


def _ahead(
    others: Sequence[Summary], base: Summary, metric: Metric, best: float, chance: float | None
) -> tuple[float, str, str] | None:
    """By how much the best method is ahead of the reference, in full and in brief; None where none is.

    Args:
        others: Methods with a mean, best first.
        base: The reference.
        metric: What is compared.
        best: The reference's best mean over all batch sizes.
        chance: Score of guessing, if it is known.
    """
    if base.mean is None:
        top = others[0].mean or 0.0
        how = "diverged" if not base.failed else "failed" if not base.diverged else "diverged or failed"
        text = f"{_name(others[0])} reached {format_score(metric, top)}, while every run of {_name(base)} {how}"
        return metric.signed(top), text, text
    ahead = _leaning(others, metric, 1)
    if not ahead:
        return None
    top, more = ahead[0].mean or 0.0, ahead[1:]
    fate = f"against {format_score(metric, base.mean)} with {_name(base)}"
    if chance is not None and base.mean < _NEAR_CHANCE * chance:
        fate = f"where {_name(base)} stayed near chance at {format_score(metric, base.mean)}"
    elif metric.unit == "%" and metric.signed(best - base.mean) > _FELL:
        verb = "fell" if metric.higher_is_better else "rose"
        fate = f"where {_name(base)} {verb} to {format_score(metric, base.mean)}"
    shared = _on_shared_seeds(ahead[0], base, metric)
    reached = f"{_name(ahead[0])} reached {format_score(metric, top)}{f' ({shared})' if shared else ''}"
    who = enumerate_words([_name(s) for s in more]) if 0 < len(more) <= _NAMED else f"{len(more)} other methods"
    full = f"{reached}, {fate}{f' ({who} did better too)' if more else ''}"
    return abs(top - base.mean), full, f"{reached} against {format_score(metric, base.mean)}"


def _behind(others: Sequence[Summary], base: Summary, metric: Metric, none: str) -> tuple[float, str, str] | None:
    """By how much the worst method is behind the reference, in full and in brief; None where none is."""
    behind = _leaning(others, metric, -1)[::-1]
    if not behind or base.mean is None:
        return None
    who = enumerate_words([_scored(s, metric, base) for s in behind])
    if len(behind) > _NAMED:
        who = (
            f"{len(behind)} methods ({'lowest' if metric.higher_is_better else 'highest'} {_scored(behind[0], metric)})"
        )
    full = f"{none} did better than {_scored(base, metric)} beyond the noise, and {who} did worse"
    return abs(base.mean - (behind[0].mean or 0.0)), full, f"{none} did better than {_name(base)} beyond the noise"
