"""The whole page in a few figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.html import Content, Html, tag, value
from attnres_ext.benchmarks.report.kept import Kept, Place
from attnres_ext.benchmarks.report.sections.rivals import rivals


def section(kept: Kept) -> Html | None:
    """Tiles for each place."""
    groups = []
    for place in kept.places:
        tiles = [*_speed(kept, place), *_roof(kept, place), *_overhead(kept, place)]
        if tiles:
            groups.append(tag("div", tag("h2", place.label), tag("div", tiles, class_="tiles")))
    return tag("section", groups, id="glance", aria_label="At a glance") if groups else None


def _speed(kept: Kept, place: Place) -> list[Html]:
    ratios: dict[str, list[float]] = {}
    for case, run in kept.newest(place).items():
        rows = run.by_case[case]
        ours = rows.get("ours")
        for name, row in rivals(rows).items():
            if ours is not None and ours.seconds and row.seconds and ours.origin != "host":
                ratios.setdefault(name, []).append(row.seconds / ours.seconds)
    return [
        _tile(
            value(mean, f"{mean:.1f} ×"),
            f"the speed of {wording.contestant(name)}",
            _of("geometric mean", found, lambda ratio: f"{ratio:.1f} ×"),
        )
        for name, found in ratios.items()
        if (mean := math.exp(statistics.fmean(map(math.log, found))))
    ]


def _roof(kept: Kept, place: Place) -> list[Html]:
    shares = []
    for case, run in kept.newest(place).items():
        ours, copy = (run.by_case[case].get(name) for name in ("ours", "copy"))
        if ours is not None and copy is not None and ours.seconds and copy.seconds:
            shares.append(copy.seconds / ours.seconds)
    if not shares:
        return []
    middle = statistics.median(shares)
    return [
        _tile(
            value(middle, f"{100 * middle:.0f} %"),
            "of a copy's bandwidth",
            _of("median", shares, lambda share: f"{100 * share:.0f} %"),
        )
    ]


def _overhead(kept: Kept, place: Place) -> list[Html]:
    """What blocks cost a training step."""
    overheads = [
        row.overhead
        for case, run in kept.newest_models(place).items()
        for row in run.models_by_case[case].values()
        if row.overhead is not None
        and (row.work, row.residual, row.contestant) == ("train", "block", "ours")
    ]
    if not overheads:
        return []
    middle = statistics.median(overheads)
    return [
        _tile(
            value(middle, wording.percent(middle)),
            "time of a training step over the standard residual",
            _of("block mode, median", overheads, wording.percent),
        )
    ]


def _of(what: str, found: Sequence[float], shown: Callable[[float], str]) -> str:
    """Of how many cases a figure is, and between which extremes they lie."""
    if len(found) == 1:
        return "one case"
    return f"{what} of {len(found)} cases, {shown(min(found))} to {shown(max(found))}"


def _tile(figure: Content, what: str, of_what: str) -> Html:
    return tag(
        "div",
        tag("p", figure, class_="figure"),
        tag("p", what),
        tag("small", of_what),
        class_="tile",
    )
