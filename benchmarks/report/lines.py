"""Charts of lines in SVG.

Horizontal positions are percentages and vertical ones pixels, so a chart takes the width that there
is while its text keeps its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnres_ext.benchmarks.report.html import Html, tag
from attnres_ext.benchmarks.report.scales import Scale, linear_ticks, scale_of

_HEIGHT = 220.0
_LABEL_HEIGHT = 15.0


@dataclass(frozen=True)
class Point:
    """One point with its spread."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        label: stands at its end.
        series: whose it is; decides on the colour.
        points: in the order of x.
        dashed: to tell apart two lines of one colour.
    """

    label: str
    series: str
    points: Sequence[Point]
    dashed: bool = False


def chart(
    description: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str],
) -> Html:
    """Lines over a common axis, with zero on the vertical one.

    Args:
        description: what is to be seen, for those who cannot.
        lines: what to draw.
        x_label: what lies on the horizontal axis.
        y_label: what lies on the vertical axis.
        y_text: a vertical value, for people.
    """
    xs = sorted({point.x for line in lines for point in line.points})
    ys = [y for line in lines for p in line.points for y in (p.y, p.low, p.high) if y is not None]
    ticks = linear_ticks(min(0.0, *ys), max(0.0, *ys))
    across, vertical = scale_of(xs), Scale(ticks[0], ticks[-1])

    def x(value: float) -> str:
        return f"{across(value)}%"

    def y(value: float) -> float:
        return round(_HEIGHT * (1 - vertical(value) / 100), 2)

    marks: list[Html] = []
    for tick in ticks:
        kind = "grid zero" if tick == 0 else "grid"
        marks.append(tag("line", x1="0%", x2="100%", y1=y(tick), y2=y(tick), class_=kind))
        marks.append(tag("text", y_text(tick), x=-8, y=y(tick) + 4, class_="tick y"))
    for value in xs:
        marks.append(tag("text", f"{value:g}", x=x(value), y=_HEIGHT + 18, class_="tick x"))
    ends = _apart([y(line.points[-1].y) for line in lines])
    for line, end in zip(lines, ends, strict=True):
        marks += _line(line, x, y)
        last = line.points[-1]
        marks.append(
            tag("text", line.label, x=x(last.x), y=end + 4, dx=10, class_=f"name {line.series}")
        )
    return tag(
        "div",
        tag("p", y_label, class_="axis-name"),
        tag("svg", tag("title", description), marks, role="img", height=_HEIGHT),
        tag("p", x_label, class_="axis-name x"),
        class_="lines",
    )


def _line(line: Line, x: Callable[[float], str], y: Callable[[float], float]) -> list[Html]:
    marks = []
    kind = f"{line.series} dashed" if line.dashed else line.series
    for before, after in itertools.pairwise(line.points):
        marks.append(
            tag("line", x1=x(before.x), x2=x(after.x), y1=y(before.y), y2=y(after.y), class_=kind)
        )
    for point in line.points:
        if point.low is not None and point.high is not None:
            at = x(point.x)
            marks.append(
                tag("line", x1=at, x2=at, y1=y(point.low), y2=y(point.high), class_=f"{kind} thin")
            )
        marks.append(tag("circle", cx=x(point.x), cy=y(point.y), r=4, class_=line.series))
    return marks


def _apart(positions: Sequence[float]) -> list[float]:
    """``positions``, moved down as far as needed for labels not to overlap."""
    moved = list(positions)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + _LABEL_HEIGHT)
    return moved


def sparkline(description: str, values: Sequence[float], verdicts: Sequence[str]) -> Html:
    """A small line without axes; what is not steady has a mark of its own shape."""
    height, edge = 34.0, 8.0
    across = Scale(0, max(len(values) - 1, 1))
    low, high = min(values), max(values)
    # A line that hardly moves must look as if it hardly moved.
    middle, half = (low + high) / 2, max((high - low) / 2, 0.1 * high)
    vertical = Scale(middle - half, middle + half)

    def place(index: int, value: float) -> tuple[str, float]:
        y = edge + (height - 2 * edge) * (1 - vertical(value) / 100)
        return f"{across(index)}%", round(y, 2)

    places = [place(index, value) for index, value in enumerate(values)]
    marks = [
        tag("line", x1=x1, y1=y1, x2=x2, y2=y2) for (x1, y1), (x2, y2) in itertools.pairwise(places)
    ]
    for (x, y), verdict in zip(places, verdicts, strict=True):
        marks.append(tag("circle", cx=x, cy=y, r=4 if verdict != "steady" else 2.5, class_=verdict))
        if verdict == "slower":
            marks.append(tag("text", "▲", x=x, y=y - 6, class_="slower"))
    return tag(
        "svg", tag("title", description), marks, role="img", height=height, class_="sparkline"
    )
