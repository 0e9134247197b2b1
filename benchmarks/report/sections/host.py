"""What a call costs before any work is done."""

from __future__ import annotations

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.bars import Axis, Bar, Row, chart
from attnres_ext.benchmarks.report.frame import code, figure, reason, sources
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Html, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place
from attnres_ext.benchmarks.report.palette import series
from attnres_ext.benchmarks.report.scales import Scale, logarithmic_ticks
from attnres_ext.benchmarks.report.sections.rivals import absent, absent_notes


def section(kept: Kept) -> Html | None:
    """A chart for each place."""
    charts = [_place(kept, place) for place in kept.places]
    if not any(charts):
        return None
    return part(
        "host",
        "Cost of a call",
        "Tensors so small that only the call is left, on one thread. Shorter is better; the axis "
        "is logarithmic.",
        [drawn for drawn in charts if drawn],
    )


def _place(kept: Kept, place: Place) -> Html | None:
    runs, groups, times = [], {}, []
    nowhere = absent(kept, place)
    for case, run in kept.newest(place).items():
        rows = {name: row for name, row in run.by_case[case].items() if row.origin == "host"}
        for name, row in rows.items():
            if row.status == "unsupported" or name in nowhere:
                continue
            heading = wording.contestant(name)
            if row.seconds is None:
                drawn: Bar | Html = tag("div", reason(row.status, row.reason), class_="lane note")
                columns = ["–", "–"]
            else:
                times.append(1e6 * row.seconds)
                drawn = Bar(1e6 * row.seconds, series(name))
                calls = row.calls_per_second
                columns = [
                    tag("b", value(row.seconds, wording.seconds(row.seconds))),
                    value(calls, f"{calls:,.0f}"),
                ]
            groups.setdefault((row.operator, f"{row.shape}, {row.work}"), []).append(
                Row(heading, [drawn], columns)
            )
            runs.append(run)
    if not times:
        return None
    scale = Scale(min(1.0, min(times)), max(10.0, *times), logarithmic=True)
    axis = Axis(scale, logarithmic_ticks(scale.low, scale.high), " µs", start=scale.low)
    drawn = chart(
        f"Time of one call on tiny tensors: {place.label}",
        ("who", "a call", "calls/s"),
        axis,
        [([code(operator), tag("small", what)], rows) for (operator, what), rows in groups.items()],
    )
    return figure(place.label, drawn, *absent_notes(kept, place), *sources(runs))
