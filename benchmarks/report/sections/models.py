"""Whole models: training steps, prefill and decode."""

from __future__ import annotations

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.frame import figure, reason, sources
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, grouped_table, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place
from attnres_ext.benchmarks.report.sections.overhead import WORKS
from attnres_ext.benchmarks.results import ModelResult

_HEADER = ["residual", "by", "time", "tokens/s", "peak memory", "over standard"]


def section(kept: Kept) -> Html | None:
    """A table for each kind of work and place."""
    tables = []
    for place in kept.places:
        works = dict.fromkeys(
            row.work
            for case, run in kept.newest_models(place).items()
            for row in run.models_by_case[case].values()
        )
        tables += [_table(kept, place, work) for work in works]
    if not tables:
        return None
    return part(
        "models",
        "Whole models",
        "Stacks of Kimi Linear layers. The yardstick is the standard residual as one kernel a "
        "site, the strictest there is. Peak memory is what one call holds beyond what was there "
        "before it.",
        tables,
    )


def _table(kept: Kept, place: Place, work: str) -> Html:
    cases: dict[str, list[ModelResult]] = {}
    runs = []
    for case, run in kept.newest_models(place).items():
        found = [row for row in run.models_by_case[case].values() if row.work == work]
        if found:
            cases[found[0].shape] = found
            runs.append(run)
    measured = [row for rows in cases.values() for row in rows]
    present = {row.contestant for row in measured if row.status != "absent"}
    nowhere = {row.contestant: row for row in measured if row.contestant not in present}
    groups = [
        (shape, [_row(row) for row in rows if row.contestant in present])
        for shape, rows in cases.items()
    ]
    notes = [
        tag("p", f"{wording.contestant(name)} ", reason(row.status, row.reason), class_="source")
        for name, row in nowhere.items()
    ]
    title = WORKS.get(work, work)
    drawn = grouped_table(_HEADER, groups, numbers=4, caption=f"{title}: {place.label}")
    return figure([title, tag("small", place.label)], drawn, *notes, *sources(runs))


def _row(row: ModelResult) -> list[Content]:
    is_yardstick = row.contestant == "standard"
    by = "attnres-ext, the yardstick" if is_yardstick else wording.contestant(row.contestant)
    names: list[Content] = [row.residual, by]
    if row.seconds is None:
        why = tag("small", reason(row.status, row.reason))
        return [row.residual, [by, why], "–", "–", "–", "–"]
    over: Content = "–"
    if row.overhead is not None and not is_yardstick:
        over = tag("b", value(row.overhead, wording.percent(row.overhead)))
        if row.overhead_quartiles:
            quartiles = " to ".join(map(wording.percent, row.overhead_quartiles))
            over = [over, tag("small", quartiles)]
    speed, peak = row.tokens_per_second, row.peak_bytes
    return [
        *names,
        value(row.seconds, wording.seconds(row.seconds)),
        value(speed, f"{speed:,.0f}") if speed else "–",
        value(peak, wording.size(peak)) if peak else "–",
        over,
    ]
