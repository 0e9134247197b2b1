"""Charts of horizontal bars: tables, in which one column draws.

Being tables they need no picture to be read aloud, copied, printed or folded to a phone's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnres_ext.benchmarks.report.html import Content, Html, tag
from attnres_ext.benchmarks.report.scales import Scale


@dataclass(frozen=True)
class Bar:
    """One bar of a row.

    Attributes:
        value: where it ends.
        series: whose it is; decides on the colour.
        label: what stands at its end.
        low: lower end of the spread.
        high: upper end.
        limit: a value that this bar cannot pass.
    """

    value: float
    series: str
    label: Content = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a chart: its heading, bars or reasons for having none, and figures."""

    heading: Content
    bars: Sequence[Bar | Html]
    columns: Sequence[Content] = ()


@dataclass(frozen=True)
class Axis:
    """What the bars are measured against.

    Attributes:
        scale: of the axis.
        ticks: values with a line and a label.
        unit: behind the ticks' numbers.
        start: where bars begin.
        mark: a value with a heavy line.
        mark_label: what it is.
    """

    scale: Scale
    ticks: Sequence[float]
    unit: str
    start: float = 0.0
    mark: float | None = None
    mark_label: str | None = None


def chart(
    caption: str,
    header: tuple[str, ...],
    axis: Axis,
    groups: Iterable[tuple[Content, Sequence[Row]]],
) -> Html:
    """A table of bars.

    Args:
        caption: what is drawn, for those who cannot see it.
        header: headings of the first column and of the columns of figures.
        axis: of the bars.
        groups: headings, each with its rows.
    """
    first, *figures = header
    head = tag(
        "tr",
        tag("th", first, scope="col"),
        tag("th", _ticks(axis), scope="col", class_="track axis"),
        [tag("th", name, scope="col", class_="number") for name in figures],
    )
    bodies = []
    for heading, rows in groups:
        group = None
        if heading is not None:
            group = tag(
                "tr",
                tag("th", heading, colspan=2 + len(figures), scope="rowgroup"),
                class_="group",
            )
        bodies.append(tag("tbody", group, [_row(row, axis, figures) for row in rows]))
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", head),
        bodies,
        class_="bars",
    )


def _ticks(axis: Axis) -> Html:
    labels = [
        tag("span", f"{tick:g}{axis.unit}", style=f"left:{axis.scale(tick)}%")
        for tick in axis.ticks
    ]
    if axis.mark is not None and axis.mark_label:
        labels.append(
            tag("span", axis.mark_label, class_="mark", style=f"left:{axis.scale(axis.mark)}%")
        )
    return tag("div", labels, class_="plot")


def _row(row: Row, axis: Axis, names: Sequence[str]) -> Html:
    lines = [tag("i", class_="grid", style=f"left:{axis.scale(tick)}%") for tick in axis.ticks]
    if axis.mark is not None:
        lines.append(tag("i", class_="grid mark", style=f"left:{axis.scale(axis.mark)}%"))
    drawn = [_bar(bar, axis) if isinstance(bar, Bar) else bar for bar in row.bars]
    return tag(
        "tr",
        tag("th", row.heading, scope="row"),
        tag("td", tag("div", lines, drawn, class_="plot"), class_="track"),
        [
            tag("td", cell, class_="number", data_name=name)
            for name, cell in zip(names, row.columns, strict=True)
        ],
    )


def _bar(bar: Bar, axis: Axis) -> Html:
    start, end = sorted((axis.scale(axis.start), axis.scale(bar.value)))
    parts = [
        tag(
            "i",
            class_=f"bar {bar.series}",
            style=f"left:{start}%;width:{round(end - start, 3)}%",
        )
    ]
    if bar.low is not None and bar.high is not None:
        low, high = axis.scale(bar.low), axis.scale(bar.high)
        parts.append(tag("i", class_="spread", style=f"left:{low}%;width:{round(high - low, 3)}%"))
    if bar.limit is not None:
        parts.append(tag("i", class_="limit", style=f"left:{axis.scale(bar.limit)}%"))
    if bar.label is not None:
        parts.append(tag("span", bar.label, class_="label", style=f"left:{end}%"))
    return tag("div", parts, class_="lane")
