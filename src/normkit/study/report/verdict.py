"""The verdict: one sentence a person would say about a study, and the caveats that belong to it.

Method names stand in backticks, so that each kind of report can set them in its own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from normkit.study.records import Metric, StudyRecord
from normkit.study.report.format import enumerate_words, format_score, pluralize, quoted
from normkit.study.report.statistics import PAIRS_FOR_A_CLAIM, Summary, unfinished

SIGNIFICANT = 0.05
_NEAR_CHANCE = 1.5  # a fraction below 1.5 times chance level is called that
_FELL = 0.1  # lost against the reference's own best batch size, where the score is a fraction
_NAMED = 3  # longer lists of methods are counted, not read out


@dataclass(frozen=True)
class Verdict:
    """What a study says.

    Attributes:
        sentence: The finding, in one sentence.
        caveats: Sentences that limit it: how many seeds, what diverged, failed or is missing.
    """

    sentence: str
    caveats: tuple[str, ...] = ()


def direction(summary: Summary, metric: Metric, *, tested: bool) -> int:
    """Return 1 where the method is ahead of the reference beyond noise, -1 where behind, 0 where neither can be said.

    Args:
        summary: A method at one batch size.
        metric: What is compared.
        tested: Whether there are p-values at this batch size. Then they decide, and a method without one is left out;
            otherwise the 95 % intervals decide, and the result is given as a measurement, not as a claim.
    """
    paired = summary.paired
    if paired is None or paired.low is None or paired.high is None:
        return 0
    beyond = paired.p_holm is not None and paired.p_holm < SIGNIFICANT if tested else paired.low > 0 or paired.high < 0
    return (1 if metric.signed(paired.difference) > 0 else -1) if beyond else 0


def reach_verdict(record: StudyRecord, summaries: Sequence[Summary]) -> Verdict:
    """Say what the study found.

    Args:
        record: A study, finished or not.
        summaries: Its summaries, see ``normkit.study.report.statistics.summarize``.
    """
    ran = [summary for summary in summaries if summary.runs]
    if not ran:
        return Verdict("No final run has ended yet, so there is nothing to compare.", _progress(record))
    caveats = (*_edges(record, ran), *_strength(record, ran), *_lost(ran), *_progress(record))
    if not any(summary.scores for summary in ran):
        return Verdict("No final run finished: every one diverged or failed.", caveats)
    sentence = _alone(ran, record.metric) if len({s.method for s in ran}) == 1 else _compared(record, ran)
    return Verdict(sentence[0].upper() + sentence[1:] + ".", caveats)


def _name(summary: Summary) -> str:
    return quoted(summary.method)


def _scored(summary: Summary, metric: Metric) -> str:
    return _name(summary) + (f" ({format_score(metric, summary.mean)})" if summary.mean is not None else "")


def _cell(summary: Summary) -> str:
    return f"{_name(summary)} at batch size {summary.batch_size}"


def _alone(ran: Sequence[Summary], metric: Metric) -> str:
    reached = [f"{format_score(metric, s.mean)} at batch size {s.batch_size}" for s in ran if s.mean is not None]
    return f"{_name(ran[0])} reached {enumerate_words(reached)}, with no other method to compare it to"


def _leaning(others: Sequence[Summary], metric: Metric, sign: int) -> list[Summary]:
    tested = any(s.paired and s.paired.p_holm is not None for s in others)
    return [s for s in others if direction(s, metric, tested=tested) == sign]


def _compared(record: StudyRecord, ran: Sequence[Summary]) -> str:
    """Describe the largest difference in full, then in brief where else a method is ahead, none is, or all are level."""
    reference, chance = record.config["reference"], record.config["chance"] or 0.0
    metric = record.metric
    best = max((s.mean for s in ran if s.method == reference and s.mean is not None), default=0.0, key=metric.signed)
    one_sided = record.config.get("alternative") == "greater"
    level = f"no method {'is shown to be better than' if one_sided else 'differs from'} `{reference}` beyond the noise"
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
        elif base and others and (found := _behind(others, base, metric)):
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
    others: Sequence[Summary], base: Summary, metric: Metric, best: float, chance: float
) -> tuple[float, str, str] | None:
    """By how much the best method is ahead of the reference, in full and in brief; None where none is.

    Args:
        others: Methods with a mean, best first.
        base: The reference.
        metric: What is compared.
        best: The reference's best mean over all batch sizes.
        chance: Score of guessing; 0 where it is not known.
    """
    if base.mean is None:
        top = others[0].mean or 0.0
        how = "diverged" if not base.failed else "failed" if not base.diverged else "diverged or failed"
        text = f"{_name(others[0])} reached {format_score(metric, top)}, while every run of {_name(base)} {how}"
        return top, text, text
    ahead = _leaning(others, metric, 1)
    if not ahead:
        return None
    top, more = ahead[0].mean or 0.0, ahead[1:]
    fate = f"against {format_score(metric, base.mean)} with {_name(base)}"
    if base.mean < _NEAR_CHANCE * chance:
        fate = f"where {_name(base)} stayed near chance at {format_score(metric, base.mean)}"
    elif metric.unit == "%" and metric.signed(best - base.mean) > _FELL:
        verb = "fell" if metric.higher_is_better else "rose"
        fate = f"where {_name(base)} {verb} to {format_score(metric, base.mean)}"
    reached = f"{_name(ahead[0])} reached {format_score(metric, top)}"
    who = enumerate_words([_name(s) for s in more]) if 0 < len(more) <= _NAMED else f"{len(more)} other methods"
    full = f"{reached}, {fate}{f' ({who} did better too)' if more else ''}"
    return abs(top - base.mean), full, f"{reached} against {format_score(metric, base.mean)}"


def _behind(others: Sequence[Summary], base: Summary, metric: Metric) -> tuple[float, str, str] | None:
    """By how much the worst method is behind the reference, in full and in brief; None where none is."""
    behind = _leaning(others, metric, -1)[::-1]
    if not behind or base.mean is None:
        return None
    who = enumerate_words([_scored(s, metric) for s in behind])
    if len(behind) > _NAMED:
        who = (
            f"{len(behind)} methods ({'lowest' if metric.higher_is_better else 'highest'} {_scored(behind[0], metric)})"
        )
    full = f"no method did better than {_scored(base, metric)} beyond the noise, and {who} did worse"
    return abs(base.mean - (behind[0].mean or 0.0)), full, f"no method did better than {_name(base)} beyond the noise"


def _edges(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    """Learning rates at the edge of their grids: of the reference, where nothing is claimed, and of other methods."""
    at_edge = [s for s in ran if s.at_edge]
    base = [s for s in at_edge if s.method == record.config["reference"] and any(s.method != t.method for t in ran)]
    found = []
    if base:
        one, sizes = len(base) == 1, enumerate_words([s.batch_size for s in base])
        found.append(
            f"The best learning rate{'' if one else 's'} of {_name(base[0])} at batch size{'' if one else 's'} {sizes} "
            f"{'lies at the edge of its grid' if one else 'lie at the edges of their grids'} "
            f"({enumerate_words([f'{s.lr:g}' for s in base])}): no claim is made there; widen "
            f"{'it' if one else 'them'} with --lr-points or give --lr."
        )
    if others := [f"{_cell(s)} ({s.lr:g})" for s in at_edge if s not in base]:
        found.append(
            f"The best learning rate lies at the edge of the grid, so that a better one may lie beyond, for "
            f"{enumerate_words(others)}."
        )
    return tuple(found)


def _strength(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    unclaimed = {s.batch_size for s in ran if s.at_edge and s.method == record.config["reference"]}
    compared = [s for s in ran if s.paired and s.batch_size not in unclaimed]
    pairs = max((s.paired.pairs for s in compared if s.paired), default=0)
    if not pairs or unfinished(record):
        return ()
    if pairs == 1:
        return ("One seed gives no measure of the noise: nothing is claimed.",)
    untested = [s for s in compared if s.paired and s.paired.p_holm is None]
    if pairs < PAIRS_FOR_A_CLAIM:
        return (f"Measured with {pairs} seeds, too few for a claim: there are 95 % intervals but no p-values.",)
    limit = f"; not tested, and so not claimed: {enumerate_words([_cell(s) for s in untested])}" if untested else ""
    level = f"{100 * SIGNIFICANT:.0f} % level, Holm-corrected over the methods at each batch size"
    return (f"Differences are claimed at the {level}{limit}.",)


def _lost(ran: Sequence[Summary]) -> tuple[str, ...]:
    """Runs without a score; they are named, since the means leave them out."""
    lost = []
    for verb, field in (("Diverged", "diverged"), ("Failed", "failed")):
        cells = [f"{_cell(s)} in {getattr(s, field)} of {pluralize(s.runs, 'run')}" for s in ran if getattr(s, field)]
        if cells:
            lost.append(f"{verb}, and left out of the means: {enumerate_words(cells)}.")
    return tuple(lost)


def _progress(record: StudyRecord) -> tuple[str, ...]:
    if not unfinished(record):
        return ()
    done = f"{len(record.trials)} of {record.planned} trials"
    return (f"The study is not finished ({done}): numbers will change and nothing is claimed.",)
