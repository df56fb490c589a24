"""A line chart as inline SVG: colours are CSS variables, lines are labelled at their ends, nothing is random.

The page's style sheet sets the colours, so light and dark are its business alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from normkit.study.report.scales import Axis, separate

COLOURS = 8  # series beyond repeat the colours, dashed
_INSET = 14.0  # of the first and last point, whose ring or crosses would cover the labels of the axis
_LABEL_HEIGHT = 14.0
_CHARACTER = 7.4  # width of a label's character at 12 px, generous
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.6 -3.6h7.2v7.2h-7.2Z",
    "M0 -4.6L4.6 3.6H-4.6Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.6L4.6 -3.6H-4.6Z",
    "M-4.6 -1.4h3.2v-3.2h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2Z",
    "M-5 0L-2.5 -4.3H2.5L5 0L2.5 4.3H-2.5Z",
    "M0 -5L1.5 -1.6L5 -1.5L2.3 0.9L3.1 4.5L0 2.5L-3.1 4.5L-2.3 0.9L-5 -1.5L-1.5 -1.6Z",
)
_CROSS = "M-3.6 -3.6L3.6 3.6M-3.6 3.6L3.6 -3.6"


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: Name at the end of the line.
        index: Chooses colour, marker and dash; 0 is the ink, for the reference.
        points: (x, y), in drawing order.
        band: (x, low, high), in drawing order.
        dots: (x, y) of single runs, drawn faintly.
        crosses: x of runs without a y (diverged or failed); drawn at the bottom.
        ring: x of a point to ring, or None.
        markers: Whether points carry markers.
        starts: x of points at which the line begins anew.
    """

    label: str
    index: int
    points: tuple[tuple[float, float], ...] = ()
    band: tuple[tuple[float, float, float], ...] = ()
    dots: tuple[tuple[float, float], ...] = ()
    crosses: tuple[float, ...] = ()
    ring: float | None = None
    markers: bool = True
    starts: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Plot:
    """The rectangle that the lines live in; between ``bottom`` and ``floor`` is the strip of crosses, if any."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float
    floor: float

    def across(self, value: float) -> float:
        return self.x.place(value, self.left + _INSET, self.right - _INSET)

    def place(self, point: Sequence[float]) -> tuple[float, float]:
        return self.across(point[0]), self.y.place(point[1], self.bottom, self.top)


def swatch(index: int) -> Markup:
    """The line and marker of a series, to stand before its name in a table."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 22 12" width="22" height="12" aria-hidden="true">{}{}</svg>'
    ).format(
        Markup('<path class="line c{}{}" d="M0 6H22"/>').format(index % COLOURS, _dash(index)), _mark(index, 11, 6)
    )


def interval(ends: tuple[float, float, float], index: int, reach: float) -> Markup:
    """A value with its interval on a scale from -reach to reach, zero in the middle, to stand in a table.

    Args:
        ends: Low end, value, high end.
        index: Chooses the colour.
        reach: Largest absolute value of the column.
    """
    low, value, high = (48 + 43 * end / reach if reach else 48.0 for end in ends)
    return Markup(
        '<svg class="interval" viewBox="0 0 96 18" width="96" height="18" aria-hidden="true">'
        '<path class="zero" d="M48 0V18"/><path class="line c{0}" d="M{1:.1f} 9H{2:.1f}"/>'
        '<circle class="mark c{0}" cx="{3:.1f}" cy="9" r="4"/></svg>'
    ).format(index % COLOURS, low, high, value)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, *, size: tuple[int, int], alt: str, css: str = "") -> Markup:
    """Draw a chart.

    Args:
        series: The lines, the first on top.
        x: Horizontal axis.
        y: Vertical axis; what lies outside is cut off at the frame.
        size: Width and height of the view box; text is 12 units high.
        alt: What the chart shows, in words.
        css: Further CSS classes.

    Returns:
        One ``svg`` element.
    """
    width, height = size
    room = min(max((len(s.label) for s in series), default=0) * _CHARACTER + 26, 0.45 * width)
    floor = height - 38.0
    bottom = floor - 20 if any(s.crosses for s in series) else floor
    plot = _Plot(x, y, 46.0, width - room, 28.0, bottom, floor)
    inside = (plot.left - 9, plot.top - 9, plot.right - plot.left + 18, plot.bottom - plot.top + 18)
    parts = [
        _frame(plot),
        Markup('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">{4}</svg>').format(
            *inside, Markup("").join(_line(s, plot) for s in reversed(series))
        ),
        *(_crosses(s, plot) for s in reversed(series)),
        _labels(series, plot, room),
    ]
    return Markup('<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        css, width, height, alt, Markup("").join(parts)
    )


def _frame(plot: _Plot) -> Markup:
    parts = [_text(0, 12, plot.y.title, "axis")]
    for tick in plot.y.ticks:
        _, level = plot.place((plot.x.low, tick))
        parts.append(Markup('<path class="rule" d="M{:.1f} {:.1f}H{:.1f}"/>').format(plot.left, level, plot.right))
        parts.append(_text(plot.left - 7, level + 4, plot.y.show(tick), "tick end"))
    if plot.y.mark:
        value, name = plot.y.mark
        _, level = plot.place((plot.x.low, value))
        parts.append(Markup('<path class="mark-line" d="M{:.1f} {:.1f}H{:.1f}"/>').format(plot.left, level, plot.right))
        parts.append(_text(plot.left + 6, level - 4, name, "small"))
    parts.append(Markup('<path class="base" d="M{:.1f} {:.1f}H{:.1f}"/>').format(plot.left, plot.floor, plot.right))
    for tick in plot.x.ticks:
        at = plot.across(tick)
        parts.append(Markup('<path class="base" d="M{:.1f} {:.1f}v4"/>').format(at, plot.floor))
        parts.append(_text(at, plot.floor + 16, plot.x.show(tick), "tick mid"))
    if plot.floor != plot.bottom:
        parts.append(_text(0, plot.floor - 5, "no score", "small"))
    parts.append(_text((plot.left + plot.right) / 2, plot.floor + 33, plot.x.title, "axis mid"))
    return Markup("").join(parts)


def _line(s: Series, plot: _Plot) -> Markup:
    colour, parts = s.index % COLOURS, []
    if s.band:
        edge = [plot.place((at, low)) for at, low, _ in s.band]
        edge += [plot.place((at, high)) for at, _, high in reversed(s.band)]
        parts.append(Markup('<path class="band c{}" d="M{}Z"/>').format(colour, _path(edge)))
    cuts = [0, *(n for n, (at, _) in enumerate(s.points) if n and at in s.starts), len(s.points)]
    pieces = [s.points[first:last] for first, last in pairwise(cuts) if last - first > 1]
    if pieces:
        path = "M".join(_path([plot.place(point) for point in piece]) for piece in pieces)
        parts.append(Markup('<path class="line c{}{}" d="M{}"/>').format(colour, _dash(s.index), path))
    dot = Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2"/>')
    parts += [dot.format(colour, *plot.place(point)) for point in s.dots]
    for point in s.points if s.markers else ():
        at = plot.place(point)
        if point[0] == s.ring:
            parts.append(Markup('<circle class="ring c{}" cx="{:.1f}" cy="{:.1f}" r="8"/>').format(colour, *at))
        parts.append(_mark(s.index, *at))
    return Markup("").join(parts)


def _crosses(s: Series, plot: _Plot) -> Markup:
    """Crosses of different series at the same place stand beside each other."""
    shape = Markup('<path class="cross c{}" transform="translate({:.1f} {:.1f})" d="{}"/>')
    places = [(plot.across(at) + 6 * (s.index % 5 - 2), plot.floor - 9) for at in s.crosses]
    return Markup("").join(shape.format(s.index % COLOURS, *place, _CROSS) for place in places)


def _labels(series: Sequence[Series], plot: _Plot, room: float) -> Markup:
    """Names right of the lines, moved apart where they would overlap, each tied to the end of its line."""
    ends = []
    for s in series:
        at, level = plot.place(s.points[-1]) if s.points else (max(map(plot.across, s.crosses)), plot.floor - 9)
        ends.append((at, min(max(level, plot.top), plot.floor)))
    heights = separate([level for _, level in ends], plot.top, plot.floor - 6, _LABEL_HEIGHT)
    longest = int((room - 20) / _CHARACTER)
    tie = Markup('<path class="tie c{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}L{:.1f} {:.1f}"/>')
    name = Markup('<text class="name c{}" x="{:.1f}" y="{:.1f}">{}</text>')
    parts = []
    for s, (at, level), height in zip(series, ends, heights, strict=True):
        label = s.label if len(s.label) <= longest else f"{s.label[: longest - 1]}…"
        parts.append(tie.format(s.index % COLOURS, at + 6, level, plot.right + 7, level, plot.right + 14, height))
        parts.append(name.format(s.index % COLOURS, plot.right + 17, height + 4, label))
    return Markup("").join(parts)


def _mark(index: int, at: float, level: float) -> Markup:
    return Markup('<path class="mark c{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
        index % COLOURS, at, level, _MARKERS[index % len(_MARKERS)]
    )


def _dash(index: int) -> str:
    return " dashed" if index >= COLOURS else ""


def _text(x: float, y: float, text: str, css: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css, x, y, text)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
