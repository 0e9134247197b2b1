"""Curves and rooflines by matplotlib, as SVG that lies in the page and takes its colours."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

_Both = tuple[Figure, Axes]
_Shares = tuple[str, dict[str, float]]
#: Of a picture, in inches.
_WIDTH = 5.0

#: Whose marks are whose, by the page's variables of colours.
_SERIES = {
    "ours": "ours",
    "eager": "eager",
    "compile": "compile",
    "compile-max": "compile",
    "standard": "standard",
    "standard-fused": "standard",
    "copy": "standard",
    "fla": "triton",
    "fla-keep": "triton",
    "fla-gluon": "triton",
    "liger": "liger",
}
#: What matplotlib draws with; the page's variables take their places, so that a picture changes
#: with its page from light to dark.
_INKS = {
    name: f"#00000{number}"
    for number, name in enumerate(
        ("ink", "soft", "line", "ours", "eager", "compile", "standard", "triton", "other"), start=1
    )
} | {"liger": "#00000a", "card": "#00000b"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "attnres",
    "font.size": 11,
    "text.color": _INKS["ink"],
    "axes.labelcolor": _INKS["soft"],
    "axes.edgecolor": _INKS["line"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.labelcolor": _INKS["ink"],
    "xtick.color": _INKS["soft"],
    "ytick.color": _INKS["soft"],
    "grid.color": _INKS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def series(name: str) -> str:
    """The colour of who ran, by its name on the page."""
    return _SERIES.get(name, "other")


@dataclass(frozen=True)
class Line:
    """A curve: its name, whose colour it has, points ``(x, y, low, high)``, and whether it is
    dashed."""

    label: str
    series: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A measurement under its roofs: operations a byte, operations a second, and whether hollow."""

    series: str
    intensity: float
    rate: float
    hollow: bool


@dataclass(frozen=True)
class Roofs:
    """What bounds every dot: bandwidths (bytes a second) with their names, the slowest first, and
    the peak (operations a second) with its name."""

    bandwidths: Sequence[tuple[str, float]]
    peak: float
    peak_label: str


def curves(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, y_text: Callable[[float], str]
) -> Markup:
    """Lines over a common axis, with zero on the vertical one, and their spread."""
    with matplotlib.rc_context(_STYLE):
        rows = -(-len(lines) // 2) if len(lines) > 1 else 0
        figure, axes = _figure(title, 3.2 + 0.22 * rows, below=0.6 + 0.22 * rows)
        for line in lines:
            x, y, low, high = map(list, zip(*line.points, strict=True))
            ink = _INKS[line.series]
            axes.vlines(x, low, high, color=ink, linewidth=1)
            axes.plot(
                x, y, color=ink, label=line.label, marker="o", markersize=5, linewidth=2,
                linestyle="--" if line.dashed else "-",
            )  # fmt: skip
        xs = sorted({x for line in lines for x, *_ in line.points})
        if xs[0] > 0 and xs[-1] >= 4 * xs[0]:
            axes.set_xscale("log")
        _tick(axes.xaxis, xs, "{:g}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: y_text(y)))
        axes.axhline(0, color=_INKS["ink"], linewidth=1)
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if rows:
            figure.legend(loc="lower left", ncols=2, fontsize=9, borderpad=0, columnspacing=1)
        said = "; ".join(
            f"{line.label}: " + ", ".join(f"{y_text(y)} at {x:g}" for x, y, *_ in line.points)
            for line in lines
        )
        return _svg(figure, f"{title}. {said}")


def shares(title: str, cases: Sequence[_Shares]) -> Markup:
    """A line for each case: whose dot lies how near to a copy's bandwidth.

    Args:
        title: above it.
        cases: their names, and shares of the copy's bandwidth by colour.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, 0.95 + 0.44 * (len(cases) + 0.3), left=0.1)
        axes.set_xscale("log")
        axes.set_xlim(
            0.8 * min(50.0, *_percents(cases)), max(130.0, *(1.1 * one for one in _percents(cases)))
        )
        axes.axvline(100, color=_INKS["ink"], linewidth=1.2)
        for place, (label, found) in enumerate(cases):
            axes.axhline(place, color=_INKS["line"], linewidth=0.6, zorder=0)
            axes.annotate(
                label, (0, place), (0, 5), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=9, color=_INKS["soft"],
            )  # fmt: skip
            for name, share in found.items():
                axes.plot(
                    100 * share, place, "o", color=_INKS[name], markersize=5 + 2 * (name == "ours")
                )
        axes.set_ylim(len(cases) - 0.5, -0.8)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        _tick(axes.xaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500], "{:g} %")
        axes.set_xlabel("of a copy's bandwidth")
        return _svg(figure, f"{title}: shares of a copy's bandwidth, {len(cases)} cases")


def _percents(cases: Sequence[_Shares]) -> list[float]:
    return [100 * share for _, found in cases for share in found.values()]


def limits(dots: Sequence[Dot], roofs: Roofs) -> tuple[float, float, float, float]:
    """Room for all dots and for where the roofs meet, on axes that several charts share."""
    across = [dot.intensity for dot in dots] + [roofs.peak / roofs.bandwidths[0][1]]
    return (
        min(across) / 1.5, 1.5 * max(across), min(dot.rate for dot in dots) / 1.5, 2 * roofs.peak
    )  # fmt: skip


def roofline(
    title: str, dots: Sequence[Dot], roofs: Roofs, limits: tuple[float, float, float, float]
) -> Markup:
    """Dots under their roofs, both axes logarithmic; ``limits`` are those of x and y."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(*limits[:2])
        axes.set_ylim(limits[2] / 1e9, limits[3] / 1e9)
        for name, bandwidth in roofs.bandwidths:
            _slope(axes, name, bandwidth, roofs.peak, limits)
        axes.plot(
            [roofs.peak / roofs.bandwidths[-1][1], limits[1]], [roofs.peak / 1e9] * 2,
            color=_INKS["ink"],
        )  # fmt: skip
        axes.annotate(
            roofs.peak_label, (limits[1], roofs.peak / 1e9), (0, 4), textcoords="offset points",
            ha="right", fontsize=10,
        )  # fmt: skip
        for name, hollow in dict.fromkeys((dot.series, dot.hollow) for dot in dots):
            some = [dot for dot in dots if (dot.series, dot.hollow) == (name, hollow)]
            axes.plot(
                [dot.intensity for dot in some], [dot.rate / 1e9 for dot in some], "o",
                markersize=6, color=_INKS[name],
                markerfacecolor=_INKS["card" if hollow else name],
            )  # fmt: skip
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
            _tick(axis, [10.0**power for power in powers], "{:g}")
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("10⁹ operations a second")
        axes.grid(axis="y")
        return _svg(figure, f"{title}: {len(dots)} measurements")


def _tick(axis: Axis, values: Sequence[float], form: str) -> None:
    """Ticks and labels at these values alone."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator([x for x in values if low <= x <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: form.format(x)))


def _slope(
    axes: Axes, name: str, bandwidth: float, peak: float, limits: tuple[float, float, float, float]
) -> None:
    start, ridge = max(limits[0], limits[2] / bandwidth), peak / bandwidth
    axes.plot(
        [start, ridge], [start * bandwidth / 1e9, peak / 1e9], color=_INKS["ink"], linewidth=1.2
    )
    middle = (start * ridge) ** 0.5
    axes.annotate(
        name, (middle, middle * bandwidth / 1e9), (-6, 3), textcoords="offset points", ha="right",
        fontsize=10,
    )  # fmt: skip


def _figure(title: str, height: float = 3.4, left: float = 0.95, below: float = 0.6) -> _Both:
    """As wide as a phone: on wider pages several stand side by side, so that text stays readable.

    Args:
        title: above the axes.
        height: in inches, as what follows.
        left: beside the axes.
        below: them.
    """
    figure = Figure(figsize=(_WIDTH, height), facecolor="none")
    # Margins by hand: to measure the text takes longer than to draw the picture.
    axes = figure.add_axes(
        (left / _WIDTH, below / height, 1 - (left + 0.1) / _WIDTH, 1 - (below + 0.35) / height)
    )
    figure.text(0.01, 1 - 0.05 / height, title, va="top")
    return figure, axes


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as an element of the page, with names of its own and the page's colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Names are the page's, where other pictures have theirs.
    prefix = f"p{zlib.crc32((description + text).encode()):x}-"
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    for name, ink in _INKS.items():
        text = text.replace(ink, f"var(--{name})")
    named = f'<svg role="img" aria-label="{escape(description)}"'
    return Markup(text.replace("<svg", named, 1))
