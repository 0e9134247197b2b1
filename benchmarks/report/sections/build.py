"""How long a build takes, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.bars import Axis, Bar, Row, chart
from attnres_ext.benchmarks.report.frame import code, figure, source
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.history import THRESHOLD
from attnres_ext.benchmarks.report.html import Content, Html, table, tag, value
from attnres_ext.benchmarks.report.kept import Kept
from attnres_ext.benchmarks.report.scales import Scale, linear_ticks

#: Steps that take less than this share of the longest one are summed up in a row.
_SMALL = 0.02
_LIBRARIES = ("_ops.so", "_C.so")


def section(kept: Kept) -> Html | None:
    """The newest build, and how it compares with those before."""
    if not kept.builds:
        return None
    newest = kept.builds[-1]
    return part(
        "build",
        "Build time and size",
        "A build from nothing, without a compiler cache. Steps run side by side, so their times "
        "add up to more than the whole takes.",
        _steps(newest),
        _libraries(newest),
        _all(kept.builds) if len(kept.builds) > 1 else None,
    )


def _steps(record: dict[str, Any]) -> Html:
    steps = sorted(record["steps"], key=lambda step: -step["seconds"])
    longest = steps[0]["seconds"]
    large = [step for step in steps if step["seconds"] >= _SMALL * longest]
    rows = [_step(code(step["target"]), step["seconds"], step["bytes"]) for step in large]
    if small := steps[len(large) :]:
        total, size = (sum(step[name] for step in small) for name in ("seconds", "bytes"))
        rows.append(_step(f"{len(small)} more together", total, size))
    ticks = linear_ticks(0, max(longest, *(row.bars[0].value for row in rows)))
    axis = Axis(Scale(0, ticks[-1]), ticks, " s")
    drawn = chart(
        "Time of each compilation and link", ("step", "takes", "makes"), axis, [(None, rows)]
    )
    archs = ", ".join(f"sm{arch}" for arch in record["cuda_archs"])
    heading = [
        f"{wording.duration(record['seconds'])} with {record['jobs']} at once",
        tag(
            "small",
            f"{wording.duration(record['processor_seconds'])} of processor time, ",
            f"CUDA sets {archs}" if archs else "without CUDA",
        ),
    ]
    return figure(heading, drawn, source(record, record["name"]))


def _step(name: Content, seconds: float, size: int) -> Row:
    columns = [value(seconds, wording.seconds(seconds)), value(size, wording.size(size))]
    return Row(name, [Bar(seconds, "s-ours")], columns)


def _libraries(record: dict[str, Any]) -> Html:
    rows, largest = [], 1.0
    for library in record["libraries"]:
        device = sum(part["bytes"] for part in library["device_code"])
        rest = "host code and everything else" if device else "all of it"
        parts = [(rest, library["bytes"] - device)]
        parts += [(f"{p['arch']}, {p['kind']}", p["bytes"]) for p in library["device_code"]]
        for index, (name, size) in enumerate(parts):
            share = tag("b", value(library["bytes"], wording.size(library["bytes"])))
            columns = [value(size, wording.size(size)), share if index == 0 else ""]
            heading = [code(library["name"]), tag("small", name)]
            rows.append(Row(heading, [Bar(size / 1e6, "s-ours")], columns))
            largest = max(largest, size / 1e6)
    ticks = linear_ticks(0, largest)
    axis = Axis(Scale(0, ticks[-1]), ticks, " MB")
    drawn = chart("Size of the libraries", ("part", "size", "whole file"), axis, [(None, rows)])
    return figure(
        [
            "Size of what is installed",
            tag("small", "device code as it lies in the file, compressed"),
        ],
        drawn,
        source(record, record["name"]),
    )


def _all(records: Sequence[dict[str, Any]]) -> Html:
    rows = []
    for index, record in reversed(list(enumerate(records))):
        alike = [one for one in records[:index] if one["cuda_archs"] == record["cuda_archs"]]
        same = [one for one in alike if wording.processor(one) == wording.processor(record)]
        rows.append(
            [
                record["date"][:10],
                wording.version(record),
                wording.processor(record),
                ", ".join(record["cuda_archs"]) or "none",
                str(record["jobs"]),
                value(record["seconds"], wording.duration(record["seconds"])),
                _against(
                    record["processor_seconds"],
                    [one["processor_seconds"] for one in same],
                    wording.duration,
                ),
                *(
                    _against(_size(record, name), [_size(one, name) for one in alike], wording.size)
                    for name in _LIBRARIES
                ),
            ]
        )
    header = ["date", "code", "machine", "CUDA sets", "at once", "took"]
    header += ["processor time", *_LIBRARIES]
    note = tag(
        "p",
        f"A mark says that a figure grew by {100 * THRESHOLD:.0f} % or more over the best build "
        "before it of the same CUDA sets, for processor time also on the same processor.",
        class_="source",
    )
    drawn = table(header, rows, numbers=5, caption="Every build kept")
    return figure("Builds over time", drawn, note, source(records[-1], records[-1]["name"]))


def _size(record: dict[str, Any], name: str) -> int | None:
    sizes = {library["name"]: library["bytes"] for library in record["libraries"]}
    return sizes.get(name)


def _against(
    now: float | None, before: Sequence[float | None], shown: Callable[[float], str]
) -> Content:
    """A figure, marked where it grew."""
    if now is None:
        return "–"
    best = min((one for one in before if one is not None), default=None)
    if best is None or now < (1 + THRESHOLD) * best:
        return value(now, shown(now))
    growth = tag("b", wording.percent(now / best - 1, 0), class_="verdict slower")
    return [value(now, shown(now)), " ", growth]
