"""How many times as long everybody else takes."""

from __future__ import annotations

from collections.abc import Mapping

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.bars import Axis, Bar, Row, chart
from attnres_ext.benchmarks.report.frame import code, figure, reason, sources
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Html, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place
from attnres_ext.benchmarks.report.palette import series
from attnres_ext.benchmarks.report.scales import Scale, logarithmic_ticks
from attnres_ext.benchmarks.results import Result

#: They do something else, or less.
YARDSTICKS = ("ours", "copy", "standard", "standard-fused")


def section(kept: Kept) -> Html | None:
    """A chart for each place."""
    charts = [_place(kept, place) for place in kept.places]
    if not any(charts):
        return None
    return part(
        "rivals",
        "Against the others",
        "How many times as long others take for the same work, on a logarithmic axis. Everybody "
        "passed the same comparison with float64 before the clock ran; who did not, or is not "
        "installed, is named and not timed.",
        [drawn for drawn in charts if drawn],
    )


def rivals(rows: Mapping[str, Result]) -> dict[str, Result]:
    """Who does the same work as we do; what nobody could do is left out."""
    return {
        name: row
        for name, row in rows.items()
        if name not in YARDSTICKS and row.status != "unsupported"
    }


def absent(kept: Kept, place: Place) -> dict[str, Result]:
    """Who was in none of a place's cases, so that saying it once is enough; a row of each."""
    rows: dict[str, list[Result]] = {}
    for case, run in kept.newest(place).items():
        for name, row in rivals(run.by_case[case]).items():
            rows.setdefault(name, []).append(row)
    return {
        name: found[0]
        for name, found in rows.items()
        if all(row.status == "absent" for row in found)
    }


def absent_notes(kept: Kept, place: Place) -> list[Html]:
    """Sentences about them, for below a chart."""
    return [
        tag(
            "p",
            f"{wording.contestant(name)} ",
            reason(row.status, row.reason),
            class_="source",
        )
        for name, row in absent(kept, place).items()
    ]


def _place(kept: Kept, place: Place) -> Html | None:
    runs, groups, ratios = [], {}, [1.0, 2.0]
    nowhere = absent(kept, place)
    for case, run in kept.newest(place).items():
        rows = run.by_case[case]
        ours, others = rows.get("ours"), rivals(rows)
        if ours is None or not others or ours.origin == "host":
            continue
        bars: list[Bar | Html] = []
        for name, row in others.items():
            if ours.seconds and row.seconds:
                ratio = row.seconds / ours.seconds
                ratios.append(ratio)
                label = [tag("b", value(ratio, f"{ratio:.1f} ×")), f" {wording.contestant(name)}"]
                if ratio < 1:
                    label.append(", faster than ours")
                bars.append(Bar(ratio, series(name), label))
            elif name not in nowhere:
                bars.append(_refused(name, row, ours))
        if not bars:
            continue
        heading = [ours.shape, tag("small", ours.work)]
        mine = value(ours.seconds, wording.seconds(ours.seconds)) if ours.seconds else "–"
        groups.setdefault(ours.operator, []).append(Row(heading, bars, [mine]))
        runs.append(run)
    if not groups:
        return None
    low = min(0.5 if min(ratios) < 1 else 1.0, min(ratios))
    scale = Scale(low, max(ratios), logarithmic=True)
    axis = Axis(scale, logarithmic_ticks(scale.low, scale.high), " ×", start=1.0, mark=1.0)
    drawn = chart(
        f"Time of others over ours: {place.label}",
        ("case", "ours takes"),
        axis,
        [(code(operator), rows) for operator, rows in groups.items()],
    )
    return figure(place.label, drawn, *absent_notes(kept, place), *sources(runs))


def _refused(name: str, row: Result, ours: Result) -> Html:
    if row.seconds:
        why: str | Html = (
            f"takes {wording.seconds(row.seconds)}; ours was not timed ({ours.status})"
        )
    else:
        why = reason(row.status, row.reason)
    return tag("div", f"{wording.contestant(name)} ", why, class_="lane note")
