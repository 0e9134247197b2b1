"""Where each operator lies under the roofs of memory and arithmetic."""

from __future__ import annotations

from attnres_ext.benchmarks import registry, traffic, wording
from attnres_ext.benchmarks.report import palette, rooflines
from attnres_ext.benchmarks.report.frame import code, figure, sources
from attnres_ext.benchmarks.report.html import Html, tag
from attnres_ext.benchmarks.report.kept import Kept, Place, Run
from attnres_ext.benchmarks.report.rooflines import Dot, Roofs

#: Who is drawn, the last ones on top.
_CONTESTANTS = ("eager", "compile", "fla", "ours")
_CASES = {case.name: case for case in registry.CASES}


def drawn(kept: Kept, place: Place) -> Html | None:
    """A chart for each operator, with the axes of all."""
    dots: dict[str, list[Dot]] = {}
    runs = []
    for name, run in kept.newest(place).items():
        case = _CASES.get(name)
        found = _dots(case, run) if case is not None else []
        if found:
            dots.setdefault(case.operator, []).extend(found)
            runs.append(run)
    roofs = next((made for run in reversed(runs) if (made := _roofs(run))), None)
    if roofs is None:
        return None
    axes = rooflines.axes_of([dot for some in dots.values() for dot in some], roofs)
    order = [palette.series(contestant) for contestant in _CONTESTANTS]
    charts = []
    for operator, some in dots.items():
        some.sort(key=lambda dot: order.index(dot.series))
        description = f"Rooflines of {operator}: {len(some)} measurements"
        chart = rooflines.chart(description, some, roofs, axes)
        charts.append(tag("div", tag("h4", code(operator)), chart))
    shown = {dot.series for some in dots.values() for dot in some}
    return figure(
        ["Under both roofs", tag("small", place.label)],
        [
            tag("p", "Operations a second (10⁹) over operations a byte", class_="axis-name"),
            tag("div", charts, class_="rooflines"),
            _legend(shown),
        ],
        *sources(runs),
    )


def _dots(case: registry.Case, run: Run) -> list[Dot]:
    rows = run.by_case[case.name]
    ours = rows.get("ours")
    if ours is None or not ours.bytes:
        return []
    operations = traffic.arithmetic(case)
    made = []
    for contestant in _CONTESTANTS:
        row = rows.get(contestant)
        if row is None or row.seconds is None:
            continue
        rate = operations / row.seconds
        label = (
            f"{wording.contestant(contestant)}: {row.shape}, {row.work}, "
            f"{wording.seconds(row.seconds)}, {rate / 1e9:.1f}e9 operations a second"
        )
        series = palette.series(contestant)
        made.append(Dot(label, series, operations / ours.bytes, rate, hollow=case.has_backward))
    return made


def _roofs(run: Run) -> Roofs | None:
    """The copies of the largest and the smallest buffer, and the fastest products."""
    copies = {float(size): rate for size, rate in (run.facts.get("copy_gbps_by_mib") or {}).items()}
    products = run.facts.get("matrix_tflops") or {}
    if not copies or not products:
        return None
    largest, smallest = max(copies), min(copies)
    sizes = [largest] if copies[smallest] <= copies[largest] else [largest, smallest]
    dtype = max(products, key=products.__getitem__)
    return Roofs(
        [(f"{copies[size]:.0f} GB/s", 1e9 * copies[size]) for size in sizes],
        1e12 * products[dtype],
        f"products in {dtype}",
    )


def _legend(shown: set[str]) -> Html:
    """Whose dots are whose."""
    names = [
        tag("span", tag("b", "● ", class_=series), wording.contestant(contestant))
        for contestant in reversed(_CONTESTANTS)
        if (series := palette.series(contestant)) in shown
    ]
    return tag(
        "p",
        names,
        tag("span", "○ with its backward"),
        class_="legend",
    )
