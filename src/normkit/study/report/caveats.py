"""The sentences below a verdict: what was compared beside it, how sure it is, what diverged, failed or is missing.

Method names stand in backticks, as in the verdict.
"""

from collections.abc import Sequence, Sized
from itertools import pairwise

from normkit.study.records import StudyRecord
from normkit.study.report.format import difference_unit, enumerate_words, format_difference, pluralize, quoted
from normkit.study.report.statistics import (
    PAIRS_FOR_A_CLAIM,
    SIGNIFICANT,
    Equivalence,
    Paired,
    Summary,
    direction,
    second_reference,
    unfinished,
)


def caveats(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    """All sentences that belong to a study, those that forbid claims first.

    Args:
        record: A study, finished or not.
        ran: Its summaries with a final run.
    """
    return (
        *_edges(record, ran),
        *_second(record, ran),
        *_equivalences(record, ran),
        *_strength(record, ran),
        *_exploratory(record, ran),
        *_grown(record),
        *_lost(ran),
        *progress(record),
    )


def progress(record: StudyRecord) -> tuple[str, ...]:
    """How far an unfinished study is."""
    if not unfinished(record):
        return ()
    done = f"{len(record.trials)} of {record.planned} trials"
    return (f"The study is not finished ({done}): numbers will change and nothing is claimed.",)


def correction(record: StudyRecord) -> str:
    """The family of tests over which p-values are corrected, in words."""
    primary, second = record.config.get("primary"), second_reference(record)
    if not primary:
        return "Holm-corrected over the methods at each batch size"
    methods, references = (
        enumerate_words([quoted(name) for name in names if name])
        for names in (primary, (record.config["reference"], second))
    )
    return f"Holm-corrected over the comparisons of {methods} with {references} at all batch sizes"


def margin_text(record: StudyRecord) -> str:
    """The margin of equivalence with its unit."""
    margin, unit = record.config["margin"], difference_unit(record.metric)
    return f"{margin:g} {'point' if (margin, unit) == (1, 'points') else unit}".rstrip()


def _cell(summary: Summary) -> str:
    return f"{quoted(summary.method)} at batch size {summary.batch_size}"


def _cells(summaries: Sequence[Summary], notes: Sequence[str] = ()) -> str:
    """Methods with their batch sizes, each size with its note."""
    sizes: dict[str, list[str]] = {}
    for k, s in enumerate(summaries):
        sizes.setdefault(s.method, []).append(f"{s.batch_size} ({notes[k]})" if notes else str(s.batch_size))
    return enumerate_words([
        f"{quoted(method)} at batch size{'s' if len(at) > 1 else ''} {enumerate_words(at)}"
        for method, at in sizes.items()
    ])


def _without_claim(ran: Sequence[Summary], reference: str) -> list[Summary]:
    """The cells of a reference whose learning rate is at the edge of its grid."""
    return [s for s in ran if s.at_edge and s.method == reference and any(s.method != t.method for t in ran)]


def _edges(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    """Learning rates at the edge of their grids: of a reference, where nothing is claimed, and of other methods."""
    found, named = [], []
    for reference in filter(None, (record.config["reference"], second_reference(record))):
        base = _without_claim(ran, reference)
        if not base:
            continue
        named += base
        one, sizes = len(base) == 1, enumerate_words([s.batch_size for s in base])
        against = "" if reference == record.config["reference"] else f" against {quoted(reference)}"
        found.append(
            f"The best learning rate{'' if one else 's'} of {quoted(reference)} at batch size{'' if one else 's'} {sizes} "
            f"{'lies at the edge of its grid' if one else 'lie at the edges of their grids'} "
            f"({enumerate_words([f'{s.lr:g}' for s in base])}): no claim{against} is made there; widen "
            f"{'it' if one else 'them'} with --lr-extend or --lr-points, or give --lr."
        )
    if others := [s for s in ran if s.at_edge and s not in named]:
        found.append(
            f"The best learning rate lies at the edge of the grid, so that a better one may lie beyond, for "
            f"{_cells(others, [f'{s.lr:g}' for s in others])}."
        )
    return tuple(found)


def _second(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    """Where primary methods are ahead of the second reference, and where behind."""
    second, metric = second_reference(record), record.metric
    unclaimed = {s.batch_size for s in _without_claim(ran, second or "")}
    compared = [(s, s.second) for s in ran if s.second and s.second.low is not None and s.batch_size not in unclaimed]
    if second is None or not compared:
        return ()
    tested = any(paired.p_holm is not None for _, paired in compared)
    clauses = []
    for sign, words in ((1, "ahead of"), (-1, "behind")):
        found = [(s, paired) for s, paired in compared if direction(paired, metric, tested=tested) == sign]
        if found:
            notes = [format_difference(metric, paired.difference) for _, paired in found]
            cells = _cells([s for s, _ in found], notes)
            clauses.append(f"{cells} {_be({s.method for s, _ in found})} {words} {quoted(second)} beyond the noise")
    if clauses:
        return (f"{'; '.join(clauses)}.",)
    one_sided = record.config.get("alternative") == "greater"
    verb = "is shown to be better than" if one_sided else "differs from"
    return (f"No primary method {verb} {quoted(second)} beyond the noise.",)


def _be(subjects: Sized) -> str:
    return "is" if len(subjects) == 1 else "are"


def _equivalences(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    """What the 90 % intervals say of the margin, for each reference in one sentence."""
    if record.config.get("margin") is None:
        return ()
    second, margin = second_reference(record), margin_text(record)
    found = []
    for reference, pairs in (
        (record.config["reference"], [(s, s.paired) for s in ran]),
        (second, [(s, s.second) for s in ran]),
    ):
        cells: dict[Equivalence, list[Summary]] = {}
        for s, paired in pairs:
            if paired and paired.equivalence:
                cells.setdefault(paired.equivalence, []).append(s)
        name = quoted(reference or "")
        words: dict[Equivalence, str] = {
            "same": f"the same as {name} within {margin}",
            "no worse": f"no more than {margin} worse than {name}",
            "worse": f"more than {margin} worse than {name}",
            "not decided": f"not decided against {name} at a margin of {margin}",
        }
        clauses = [
            f"{_cells(cells[k])} {_be({s.method for s in cells[k]})} {text}" for k, text in words.items() if k in cells
        ]
        if clauses:
            found.append(f"{'; '.join(clauses)} (paired 90 % intervals).")
    pairs = [s.paired.pairs for s in ran if s.paired]
    if pairs and max(pairs) < PAIRS_FOR_A_CLAIM and not unfinished(record):
        found.append(f"Equivalence within {margin} is not judged with fewer than {PAIRS_FOR_A_CLAIM} seeds.")
    return tuple(found)


def _strength(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    unclaimed = {s.batch_size for s in _without_claim(ran, record.config["reference"])}
    compared: list[tuple[Summary, Paired]] = [
        (s, s.paired) for s in ran if s.paired and not s.exploratory and s.batch_size not in unclaimed
    ]
    pairs = max((paired.pairs for _, paired in compared), default=0)
    if not pairs or unfinished(record):
        return ()
    if pairs == 1:
        return ("One seed gives no measure of the noise: nothing is claimed.",)
    if pairs < PAIRS_FOR_A_CLAIM:
        return (f"Measured with {pairs} seeds, too few for a claim: there are 95 % intervals but no p-values.",)
    untested = [_cell(s) for s, paired in compared if paired.p_holm is None]
    limit = f"; not tested, and so not claimed: {enumerate_words(untested)}" if untested else ""
    return (f"Differences are claimed at the {100 * SIGNIFICANT:.0f} % level, {correction(record)}{limit}.",)


def _exploratory(record: StudyRecord, ran: Sequence[Summary]) -> tuple[str, ...]:
    others = dict.fromkeys(s.method for s in ran if s.exploratory and s.method != second_reference(record))
    if not others:
        return ()
    names, them = [quoted(method) for method in others], "it" if len(others) == 1 else "them"
    return (f"{enumerate_words(names)} {_be(names)} exploratory: nothing is claimed about {them}.",)


def _grown(record: StudyRecord) -> tuple[str, ...]:
    """What was added after results were there to be seen."""
    sentences = []
    for before, after in pairwise([*record.config.get("grown", []), record.config]):
        methods = [quoted(method) for method in after["methods"] if method not in before["methods"]]
        sizes = [f"batch size {size}" for size in after["batch_sizes"] if size not in before["batch_sizes"]]
        seeds = after["seeds"] - before["seeds"]
        added = [*methods, *sizes, *([f"{seeds} of {pluralize(after['seeds'], 'seed')}"] if seeds else [])]
        if added:
            sentences.append(f"Added after trials had ended: {enumerate_words(added)}.")
    return tuple(sentences)


def _lost(ran: Sequence[Summary]) -> tuple[str, ...]:
    """Runs without a score; they are named, since the means leave them out."""
    lost = []
    for verb, field in (("Diverged", "diverged"), ("Failed", "failed")):
        cells = [f"{_cell(s)} in {getattr(s, field)} of {pluralize(s.runs, 'run')}" for s in ran if getattr(s, field)]
        if cells:
            lost.append(f"{verb}, and left out of the means: {enumerate_words(cells)}.")
    return tuple(lost)
