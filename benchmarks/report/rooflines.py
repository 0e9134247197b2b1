"""Rooflines in SVG: operations a second over operations a byte, both logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from attnres_ext.benchmarks.report.html import Html, tag
from attnres_ext.benchmarks.report.scales import Scale, logarithmic_ticks

_HEIGHT = 210.0
_MOST_TICKS = 6


@dataclass(frozen=True)
class Dot:
    """One measurement.

    Attributes:
        label: what it is, shown where the pointer rests.
        series: whose it is; decides on the colour.
        intensity: operations a byte.
        rate: operations a second.
        hollow: to tell apart two kinds of one colour.
    """

    label: str
    series: str
    intensity: float
    rate: float
    hollow: bool = False


@dataclass(frozen=True)
class Roofs:
    """What bounds every dot.

    Attributes:
        bandwidths: bytes a second, with their names, lowest first.
        peak: operations a second.
        peak_label: its name.
    """

    bandwidths: Sequence[tuple[str, float]]
    peak: float
    peak_label: str


@dataclass(frozen=True)
class Axes:
    """Axes that several charts share."""

    across: Scale
    upward: Scale


def axes_of(dots: Iterable[Dot], roofs: Roofs) -> Axes:
    """Room for all dots and for where the roofs meet."""
    dots = list(dots)
    intensities = [dot.intensity for dot in dots] + [roofs.peak / roofs.bandwidths[0][1]]
    return Axes(
        Scale(min(intensities) / 1.5, 1.5 * max(intensities), logarithmic=True),
        Scale(min(dot.rate for dot in dots) / 1.5, 2 * roofs.peak, logarithmic=True),
    )


def chart(description: str, dots: Sequence[Dot], roofs: Roofs, axes: Axes) -> Html:
    """Dots under their roofs.

    Args:
        description: what is to be seen, for those who cannot.
        dots: what to draw, the most important last.
        roofs: what bounds them.
        axes: where everything lies.
    """

    def x(intensity: float) -> str:
        return f"{axes.across(intensity)}%"

    def y(rate: float) -> float:
        return round(_HEIGHT * (1 - axes.upward(rate) / 100), 2)

    marks: list[Html] = []
    for tick in _few(logarithmic_ticks(axes.upward.low, axes.upward.high)):
        marks.append(tag("line", x1="0%", x2="100%", y1=y(tick), y2=y(tick), class_="grid"))
        marks.append(tag("text", f"{tick / 1e9:g}", x=-8, y=y(tick) + 4, class_="tick y"))
    for tick in _few(logarithmic_ticks(axes.across.low, axes.across.high)):
        marks.append(tag("text", f"{tick:g}", x=x(tick), y=_HEIGHT + 18, class_="tick x"))
    marks += _roofs(roofs, axes, x, y)
    for dot in dots:
        kind = f"{dot.series} hollow" if dot.hollow else dot.series
        place = {"cx": x(dot.intensity), "cy": y(dot.rate)}
        marks.append(tag("circle", tag("title", dot.label), **place, r=4, class_=kind))
    return tag("svg", tag("title", description), marks, role="img", height=_HEIGHT)


def _roofs(
    roofs: Roofs, axes: Axes, x: Callable[[float], str], y: Callable[[float], float]
) -> list[Html]:
    marks = []
    for number, (name, bandwidth) in enumerate(roofs.bandwidths):
        # From where it comes into the picture, from the left or from below.
        start = max(axes.across.low, axes.upward.low / bandwidth)
        ridge = roofs.peak / bandwidth
        ends = {"x1": x(start), "y1": y(start * bandwidth), "x2": x(ridge), "y2": y(roofs.peak)}
        marks.append(tag("line", **ends, class_="roof" if number == 0 else "roof thin"))
        middle = (start * ridge) ** 0.5
        at = {"x": x(middle), "y": y(middle * bandwidth) - 5, "dx": -5}
        marks.append(tag("text", name, **at, class_="tick y roof-name"))
    lowest = roofs.peak / roofs.bandwidths[-1][1]
    top = {"y1": y(roofs.peak), "y2": y(roofs.peak)}
    marks.append(tag("line", x1=x(lowest), x2="100%", **top, class_="roof"))
    above = {"x": "100%", "y": y(roofs.peak) - 6}
    marks.append(tag("text", roofs.peak_label, **above, class_="tick y roof-name"))
    return marks


def _few(ticks: list[float]) -> list[float]:
    """Powers of ten alone where all would be too many."""
    if len(ticks) <= _MOST_TICKS:
        return ticks
    return [tick for tick in ticks if f"{tick:e}".startswith("1.0")]
