"""How close each operator comes to a copy of the bytes that it must move."""

from __future__ import annotations

import statistics

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report import lines
from attnres_ext.benchmarks.report.bars import Axis, Bar, Row, chart
from attnres_ext.benchmarks.report.frame import code, figure, sources
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place, Run
from attnres_ext.benchmarks.report.scales import Scale, linear_ticks
from attnres_ext.benchmarks.report.sections import roofline
from attnres_ext.benchmarks.results import Result

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def section(kept: Kept) -> Html | None:
    """A chart for each place."""
    charts = [
        drawn
        for place in kept.places
        for drawn in (_place(kept, place), roofline.drawn(kept, place), _ladder(kept, place))
    ]
    if not any(charts):
        return None
    return part(
        "roof",
        "How close to the memory's roof",
        "These operators do little arithmetic on many bytes, so the memory is their roof. Each bar "
        "is the time of a plain copy over ours, where the copy moves exactly the bytes that the "
        "operator must move and took turns with it in the same process. A bar that reaches the "
        "line at 100 % does nothing but move its bytes. Thin lines span the middle half of the "
        "samples. Where an operator's matrix products alone would take longer than the copy, at "
        "the rate of large products in the same process, a red mark shows how far it can get. The "
        "rooflines count the operations of the definition, for everybody alike: what lies left of "
        "where the roofs meet is bound by memory. Their lower slope is a copy of large buffers, "
        "the upper one of buffers that fit into a cache.",
        [drawn for drawn in charts if drawn],
    )


def _place(kept: Kept, place: Place) -> Html | None:
    runs, groups, most = [], {}, 1.0
    for case, run in kept.newest(place).items():
        rows = run.by_case[case]
        ours, copy = rows.get("ours"), rows.get("copy")
        if copy is None or copy.seconds is None or ours is None:
            continue
        row, reached = _row(ours, copy, _products(ours, run))
        groups.setdefault(ours.operator, []).append(row)
        most = max(most, reached)
        runs.append(run)
    if not groups:
        return None
    scale = Scale(0, max(110.0, 102 * most))
    # Labels that would run into that of the copy or out of the chart are left out.
    ticks = [t for t in linear_ticks(0, scale.high) if t <= 0.9 * scale.high and abs(t - 100) > 20]
    axis = Axis(scale, ticks, " %", mark=100, mark_label="100 % = copy")
    drawn = chart(
        f"Share of a copy's bandwidth that each operator reaches: {place.label}",
        ("case", "of copy", "time", "GB/s", "copy GB/s"),
        axis,
        [(code(operator), rows) for operator, rows in groups.items()],
    )
    return figure(place.label, drawn, *sources(runs))


def _ladder(kept: Kept, place: Place) -> Html | None:
    """The copy by itself, by the size of its buffers."""
    measured = [run for run in kept.at(place) if run.facts.get("copy_gbps_by_mib")]
    if not measured:
        return None
    run = measured[-1]
    rates = {float(size): rate for size, rate in run.facts["copy_gbps_by_mib"].items()}
    points = [lines.Point(size, rates[size]) for size in sorted(rates)]
    if len(points) < 2:
        return None
    said = ", ".join(f"{point.y:.1f} GB/s at {point.x:g} MiB" for point in points)
    drawn = lines.chart(
        f"Bandwidth of a copy: {said}",
        [lines.Line("copy", "s-standard", points)],
        x_label="MiB in each of its two buffers",
        y_label="GB/s, read and written",
        y_text=lambda rate: f"{rate:g}",
    )
    heading = [
        "The copy by itself",
        tag("small", place.label),
        tag("small", "What fits into a cache is copied faster: one figure for all would not do"),
    ]
    return figure(heading, drawn, *sources([run]))


def _products(ours: Result, run: Run) -> float | None:
    """Seconds for the operator's matrix products alone, at the rate that this machine reached."""
    rates = run.facts.get("matrix_tflops") or {}
    # A CPU multiplies in float32 whatever the elements are.
    rate = rates.get(_DTYPES.get(ours.shape.split()[-1], ""), rates.get("float32"))
    return ours.operations / (1e12 * rate) if ours.operations and rate else None


def _row(ours: Result, copy: Result, products: float | None) -> tuple[Row, float]:
    heading: list[Content] = [ours.shape, tag("small", ours.work)]
    limit = None
    if products is not None and products > copy.seconds:
        limit = 100 * copy.seconds / products
        heading.append(tag("small", f"products alone {wording.seconds(products)}", class_="bad"))
    if ours.seconds is None:
        text = tag("span", tag("b", ours.status), f": {ours.reason}", class_="bad")
        return Row(heading, [text], ["–", "–", "–", _rate(copy)]), 0.0
    share = copy.seconds / ours.seconds
    low = high = share
    if len(ours.samples) > 1:
        first, _, third = statistics.quantiles(ours.samples, n=4, method="inclusive")
        low, high = copy.seconds / third, copy.seconds / first
    bar = Bar(100 * share, "s-ours", low=100 * low, high=100 * high, limit=limit)
    columns = [
        tag("b", value(share, f"{100 * share:.0f} %")),
        value(ours.seconds, wording.seconds(ours.seconds)),
        _rate(ours),
        _rate(copy),
    ]
    return Row(heading, [bar], columns), high


def _rate(row: Result) -> Html | str:
    return value(row.bandwidth, f"{row.bandwidth / 1e9:.1f}") if row.bandwidth else "–"
