"""Numbers and names as people write them."""

from collections.abc import Sequence

from normkit.study.records import Metric


def format_percent(fraction: float) -> str:
    """A fraction as people write it.

    >>> format_percent(0.9123)
    '91.2 %'
    """
    return f"{100 * fraction:.1f} %"


def format_score(metric: Metric, score: float) -> str:
    """A score with its unit.

    Args:
        metric: What it measures.
        score: The score.

    >>> format_score(Metric(), 0.9123), format_score(Metric("RMSE", "mm"), 3.14159), format_score(Metric("Dice", ""), 0.8)
    ('91.2 %', '3.142 mm', '0.8')
    """
    return format_percent(score) if metric.unit == "%" else f"{format_number(metric, score)} {metric.unit}".rstrip()


def format_number(metric: Metric, score: float) -> str:
    """A score without its unit.

    Args:
        metric: What it measures.
        score: The score.

    >>> format_number(Metric(), 0.9123), format_number(Metric("RMSE", "mm"), 1234.5678)
    ('91.2', '1235')
    """
    return f"{100 * score:.1f}" if metric.unit == "%" else f"{score:.4g}".replace("-", "−")


def format_difference(metric: Metric, difference: float) -> str:
    """A difference of scores with its sign, in percentage points where the unit is percent.

    Args:
        metric: What they measure.
        difference: The difference.

    >>> format_difference(Metric(), -0.0123), format_difference(Metric("RMSE", "mm"), 0.012345)
    ('−1.2', '+0.0123')
    """
    if metric.unit == "%":
        return format_points(difference)
    return f"{difference:+.3g}".replace("-", "−") if difference else "0"


def difference_unit(metric: Metric) -> str:
    """Unit of a difference of scores.

    Args:
        metric: What they measure.

    >>> difference_unit(Metric()), difference_unit(Metric("RMSE", "mm"))
    ('points', 'mm')
    """
    return "points" if metric.unit == "%" else metric.unit


def in_unit(unit: str) -> str:
    """The unit behind a comma, for the title of an axis or a column; nothing without a unit.

    Args:
        unit: The unit.

    >>> in_unit("mm"), in_unit("")
    (', mm', '')
    """
    return f", {unit}" if unit else ""


def enumerate_words(items: Sequence[object]) -> str:
    """Items as an enumeration.

    >>> enumerate_words([64, 8, 1])
    '64, 8 and 1'
    """
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def pluralize(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    >>> pluralize(1, "seed"), pluralize(3, "seed"), pluralize(2, "study", "studies")
    ('1 seed', '3 seeds', '2 studies')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def quoted(method: str) -> str:
    """A method's name in backticks, which it cannot contain itself.

    >>> quoted("batch")
    '`batch`'
    """
    return f"`{method.replace('`', chr(39))}`"


def format_points(fraction: float) -> str:
    """A difference of accuracies in percentage points, with its sign.

    >>> format_points(-0.0123), format_points(0.0)
    ('−1.2', '0.0')
    """
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")


def format_p(p: float) -> str:
    """A p-value to two figures, small ones as a bound.

    >>> format_p(0.0321), format_p(0.7182), format_p(1e-7)
    ('0.032', '0.72', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_seconds(value: float) -> str:
    """A duration with three figures.

    >>> format_seconds(0.00213), format_seconds(1.5)
    ('2.13 ms', '1.5 s')
    """
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def format_bytes(value: float) -> str:
    """A number of bytes.

    >>> format_bytes(1536), format_bytes(10 * 2**20)
    ('1.5 KiB', '10 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def format_duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> format_duration(4.21), format_duration(75), format_duration(7320)
    ('4.2 s', '1 min 15 s', '2 h 02 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
