"""What became faster or slower from run to run."""

from __future__ import annotations

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report import history, lines
from attnres_ext.benchmarks.report.frame import figure, sources
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, table, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place

_WORDS = {history.SLOWER: "slower", history.FASTER: "faster", history.STEADY: "steady"}


def section(kept: Kept) -> Html:
    """A table for each place that ran a case more than once."""
    tables = [drawn for place in kept.places if (drawn := _place(kept, place))]
    rule = (
        f"Slower means: at least {100 * history.THRESHOLD:.0f} % above the best earlier run in the "
        "same place, with middle halves of the samples that do not overlap, and still that much "
        "after dividing by what the yardstick of the same turns took. So a noisy or slower "
        "machine is not taken for slower code."
    )
    if not tables:
        rule += " There is only one run of everything so far, so nothing to compare."
    return part("history", "From commit to commit", rule, tables)


def _place(kept: Kept, place: Place) -> Html | None:
    found = history.series(kept, place)
    if not found:
        return None
    order = {history.SLOWER: 0, history.FASTER: 1, history.STEADY: 2}
    found.sort(key=lambda one: order[one.verdict])
    header = ["case", "so far", "now", "against the best before", "its yardstick", "verdict"]
    drawn = table(
        header, [_row(one) for one in found], numbers=4, caption=f"History: {place.label}"
    )
    worse = sum(one.verdict == history.SLOWER for one in found)
    summary = "no regression" if worse == 0 else f"{worse} of {len(found)} slower"
    heading = [summary, tag("small", place.label)]
    return figure(heading, drawn, *sources(p.run for one in found for p in one.points))


def _row(one: history.Series) -> list[Content]:
    times = [point.seconds for point in one.points]
    said = ", ".join(
        f"{point.run.date[:10]} {wording.seconds(point.seconds)}"
        + ("" if verdict == history.STEADY else f" ({verdict})")
        for point, verdict in zip(one.points, one.verdicts, strict=True)
    )
    first, last = ((one.points[end].run.facts.get("commit") or "unknown")[:7] for end in (0, -1))
    change = one.changes[-1]
    return [
        one.label,
        [
            lines.sparkline(f"{one.label}: {said}", times, one.verdicts),
            tag("small", f"{first} → {last}, {len(times)} runs", class_="whole"),
        ],
        value(times[-1], wording.seconds(times[-1])),
        value(change, wording.percent(change, 0)),
        "–" if one.drift is None else value(one.drift, wording.percent(one.drift, 0)),
        tag("b", _WORDS[one.verdict], class_=f"verdict {one.verdict}"),
    ]
