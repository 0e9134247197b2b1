"""What each part of the page shows, as cards of tables and pictures; the template lays them out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from attnres_ext import sources

from .. import registry, tables, traffic, wording
from ..results import ModelResult, Result
from ..tables import Rows, Table
from . import charts, history
from .kept import Kept, Place, Run

#: They do something else, or less, than the operator.
YARDSTICKS = ("ours", "copy", "standard", "standard-fused")
#: Who is drawn, the last ones on top.
_DRAWN = ("eager", "compile", "fla", "ours")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_WORKS = {
    "train": "Training step",
    "prefill": "Prefill",
    "decode": "Decode step",
    "reads": "Reads of a decode step",
}
#: What lies along an axis of models, by its name.
_AXES: dict[str, tuple[str, Callable[[ModelResult], int]]] = {
    "layers": ("layers", lambda row: row.layers),
    "blocks": ("blocks at the end of the stack, with the embedding", lambda row: row.blocks),
    "tokens": ("tokens in a call", lambda row: row.batch * row.tokens),
    "hidden": ("hidden size", lambda row: row.hidden),
}


@dataclass
class Card:
    """Something shown together.

    Attributes:
        title: its heading.
        small: beside that.
        table: figures.
        pictures: as many side by side as there is room for.
        notes: sentences below.
        records: of the runs behind it.
        legend: whose colour is whose.
    """

    title: str
    small: str = ""
    table: Table | None = None
    pictures: Sequence[Markup] = ()
    notes: Sequence[str] = ()
    records: Sequence[dict[str, Any]] = ()
    legend: Sequence[tuple[str, str]] = ()


def _records(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What is said of the runs behind a card, each once, oldest first."""
    return [run.record for run in sorted({run.name: run for run in runs}.values(), key=Run.when)]


def glance(kept: Kept) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The page in a few figures: places, each with a figure, what it is, and of how many cases."""
    groups = []
    for place in kept.places:
        ratios: dict[str, list[float]] = {}
        shares = []
        for _, rows in kept.newest(place):
            ours, copy = (tables.seconds_of(rows, name) for name in ("ours", "copy"))
            for name, row in rows.items():
                if ours and row.seconds and name not in YARDSTICKS and row.origin != "host":
                    ratios.setdefault(name, []).append(row.seconds / ours)
            if ours and copy:
                shares.append(copy / ours)
        over = [
            row.overhead
            for _, models in kept.newest_models(place)
            for (residual, who), row in models.items()
            if row.overhead is not None and (row.work, residual, who) == ("train", "block", "ours")
        ]
        mean, median = statistics.geometric_mean, statistics.median
        tiles = [
            _tile(f"the speed of {wording.baseline(name)}", found, "geometric mean", mean, _times)
            for name, found in ratios.items()
        ]
        if shares:
            tiles.append(_tile("of a copy's bandwidth", shares, "median", median, _share))
        if over:
            what = "time of a training step over the standard residual"
            tiles.append(_tile(what, over, "block mode, median", median, wording.percent))
        if tiles:
            groups.append((place.label, tiles))
    return groups


def _times(ratio: float) -> str:
    return f"{ratio:.1f} ×"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"


def _tile(
    what: str,
    found: Sequence[float],
    said: str,
    middle: Callable[[Sequence[float]], float],
    shown: Callable[[float], str],
) -> tuple[str, str, str]:
    extremes = f"{said} of {len(found)} cases, {shown(min(found))} to {shown(max(found))}"
    return shown(middle(found)), what, "one case" if len(found) == 1 else extremes


# Operators


def operators(kept: Kept, place: Place) -> Iterator[Card]:
    """Against a copy of the bytes that each must move, against everybody else, and the roofs."""
    shown = [(run, rows) for run, rows in kept.newest(place) if "ours" in rows]
    shown = [(run, rows) for run, rows in shown if rows["ours"].origin != "host"]
    if not shown:
        return
    cases = [rows for _, rows in shown]
    others = [name for name in _timed(cases) if name not in ("ours", "copy")]
    table, failed = tables.operators(cases, others)
    yield Card(
        place.label, "", table, _shares(cases), [*failed, *_lower_roofs(shown), *_excuses(cases)],
        _records(run for run, _ in shown), _legend(_timed(cases)),
    )  # fmt: skip
    yield from _rooflines(place, shown)
    yield from _ladder(kept, place)


def _lower_roofs(shown: Iterable[tuple[Run, Rows]]) -> Iterator[str]:
    """Where matrix products alone take longer than the copy, at the rate that was reached here."""
    for run, rows in shown:
        ours, copy = rows["ours"], tables.seconds_of(rows, "copy")
        rates = run.facts.get("matrix_tflops") or {}
        # A CPU multiplies in float32 whatever the elements are.
        rate = rates.get(_DTYPES.get(ours.shape.split()[-1], ""), rates.get("float32"))
        if ours.operations and rate and copy and ours.operations / (1e12 * rate) > copy:
            products = ours.operations / (1e12 * rate)
            yield (
                f"`{ours.operator}` {ours.shape} {ours.work}: its matrix products alone take "
                f"{wording.seconds(products)}, more than the copy, so {_share(copy / products)} of "
                "copy is its limit."
            )


def _timed(cases: Iterable[Rows]) -> list[str]:
    """Who was timed in any of the cases."""
    return list(dict.fromkeys(name for rows in cases for name, row in rows.items() if row.seconds))


def _legend(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(charts.series(n), wording.baseline(n)) for n in reversed(_DRAWN) if n in names]


def _excuses(cases: Iterable[Rows]) -> list[str]:
    """Who was not timed, and why; what nobody could do is left out."""
    found: dict[str, None] = {}
    for row in (row for rows in cases for row in rows.values()):
        if row.status in ("wrong", "failed") and row.contestant != "ours":
            what = "refused: wrong results" if row.status == "wrong" else "failed"
            case = f"`{row.operator}` {row.shape} {row.work}"
            found[f"{wording.baseline(row.contestant)} in {case} {what}: {row.reason}"] = None
        elif row.status == "absent":
            found[f"{wording.baseline(row.contestant)} not here: {row.reason}"] = None
    return list(found)


def _shares(cases: Iterable[Rows]) -> list[Markup]:
    """A picture for each operator: everybody's share of a copy's bandwidth."""
    found: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for rows in cases:
        copy, ours = tables.seconds_of(rows, "copy"), rows["ours"]
        shares = {
            charts.series(name): copy / rows[name].seconds
            for name in _DRAWN
            if copy and name in rows and rows[name].seconds
        }
        if shares:
            label = f"{ours.shape}, {ours.work}"
            found.setdefault(ours.operator, []).append((label, shares))
    return [charts.shares(operator, some) for operator, some in found.items()]


def _rooflines(place: Place, shown: Sequence[tuple[Run, Rows]]) -> Iterator[Card]:
    roofs = next((made for run, _ in reversed(shown) if (made := _roofs(run))), None)
    known = {case.name: case for case in registry.CASES}
    dots: dict[str, list[charts.Dot]] = {}
    runs = []
    for run, rows in shown:
        case, num_bytes = known.get(rows["ours"].case), rows["ours"].bytes
        if case is None or not num_bytes:
            continue
        operations = traffic.arithmetic(case)
        dots.setdefault(case.operator, []).extend(
            charts.Dot(
                charts.series(name), operations / num_bytes, operations / rows[name].seconds,
                case.has_backward,
            )
            for name in _DRAWN
            if name in rows and rows[name].seconds
        )  # fmt: skip
        runs.append(run)
    if roofs is None or not runs:
        return
    limits = charts.limits([dot for some in dots.values() for dot in some], roofs)
    pictures = [charts.roofline(operator, some, roofs, limits) for operator, some in dots.items()]
    note = "Filled: forward. Hollow: with its backward."
    legend = _legend(_timed(rows for _, rows in shown))
    yield Card("Under both roofs", place.label, None, pictures, [note], _records(runs), legend)


def _roofs(run: Run) -> charts.Roofs | None:
    """The copies of the largest and the smallest buffer, and the fastest products."""
    copies = {float(size): rate for size, rate in (run.facts.get("copy_gbps_by_mib") or {}).items()}
    products = run.facts.get("matrix_tflops") or {}
    if not copies or not products:
        return None
    largest, smallest = max(copies), min(copies)
    sizes = [largest] if copies[smallest] <= copies[largest] else [largest, smallest]
    dtype = max(products, key=products.__getitem__)
    return charts.Roofs(
        [(f"{copies[size]:.0f} GB/s", 1e9 * copies[size]) for size in sizes],
        1e12 * products[dtype],
        f"products in {dtype}",
    )


def _ladder(kept: Kept, place: Place) -> Iterator[Card]:
    """The copy by itself, by the size of its buffers."""
    runs = [run for run in kept.at(place) if len(run.facts.get("copy_gbps_by_mib") or ()) > 1]
    if not runs:
        return
    rates = {float(size): rate for size, rate in runs[-1].facts["copy_gbps_by_mib"].items()}
    points = [(size, rates[size], rates[size], rates[size]) for size in sorted(rates)]
    drawn = charts.curves(
        "Bandwidth of a copy", [charts.Line("copy", "standard", points)],
        "MiB in each of its two buffers", "GB/s, read and written", lambda rate: f"{rate:g}",
    )  # fmt: skip
    why = "What fits into a cache is copied faster: one figure for all would not do."
    yield Card("The copy by itself", place.label, None, [drawn], [why], _records(runs[-1:]))


def calls(kept: Kept, place: Place) -> Iterator[Card]:
    """What a call costs before any work is done."""
    shown = [(run, rows) for run, rows in kept.newest(place) if _is_host(rows)]
    table = tables.host(rows for _, rows in shown)
    if table.rows:
        cases = [rows for _, rows in shown]
        runs = _records(run for run, _ in shown)
        yield Card(place.label, "", table, (), _excuses(cases), runs)


def _is_host(rows: Rows) -> bool:
    return any(row.origin == "host" for row in rows.values())


# Models


def models(kept: Kept, place: Place) -> Iterator[Card]:
    """Training steps, prefill and decode: curves over the size of the stack, and every figure."""
    shown = list(kept.newest_models(place))
    if not shown:
        return
    rows = [row for _, found in shown for row in found.values()]
    excuses = dict.fromkeys(
        f"{wording.baseline(row.contestant)} {row.status}: {row.reason}"
        for row in rows
        if not row.seconds
    )
    runs = _records(run for run, _ in shown)
    yield Card(place.label, "", tables.models(rows), list(_curves(rows)), [*excuses], runs)


def _curves(rows: Iterable[ModelResult]) -> Iterator[Markup]:
    """A chart for each kind of work and axis that has at least two points."""
    found: dict[tuple[str, str, str], list[ModelResult]] = {}
    for row in rows:
        if row.overhead is not None and row.residual != "standard":
            for axis in row.scaling:
                found.setdefault((row.work, row.origin, axis), []).append(row)
    for (work, _, axis), some in found.items():
        label, position = _AXES[axis]
        if len({position(row) for row in some}) < 2:
            continue
        lines: dict[tuple[str, str], list[ModelResult]] = {}
        for row in sorted(some, key=position):
            lines.setdefault((row.contestant, row.residual), []).append(row)
        drawn = [
            charts.Line(
                f"{residual}, {wording.baseline(who)}", charts.series(who),
                [(position(row), *_over(row)) for row in points], dashed=residual == "full",
            )
            for (who, residual), points in lines.items()
        ]  # fmt: skip
        by = "hidden size" if axis == "hidden" else axis
        title = f"{_WORKS.get(work, work)}, by {by}"
        yield charts.curves(title, drawn, label, "over standard", _percent)


def _over(row: ModelResult) -> tuple[float, float, float]:
    low, high = row.overhead_quartiles or (row.overhead, row.overhead)
    return 100 * row.overhead, 100 * low, 100 * high


def _percent(over: float) -> str:
    return wording.percent(over / 100, 0 if over == round(over) else 1)


def training(kept: Kept) -> Iterator[Card]:
    """The newest training run."""
    for record in kept.trainings[-1:]:
        table, about = tables.training(record)
        yield Card("A training run", about, table, records=[record])


# Builds and checks


def builds(kept: Kept) -> Iterator[Card]:
    """How long the newest build took and what came out, and how all of them compare."""
    for record in kept.builds[-1:]:
        archs = ", ".join(f"sm{arch}" for arch in record["cuda_archs"])
        what = f"CUDA sets {archs}" if archs else "without CUDA"
        took = f"{wording.duration(record['seconds'])} with {record['jobs']} at once"
        yield Card(took, what, tables.build(record), records=[record])
    if len(kept.builds) < 2:
        return
    rows = []
    for index, record in reversed(list(enumerate(kept.builds))):
        alike = [one for one in kept.builds[:index] if one["cuda_archs"] == record["cuda_archs"]]
        same = [one for one in alike if wording.processor(one) == wording.processor(record)]
        computed = [one["processor_seconds"] for one in same]
        rows.append(
            [
                record["date"][:10], wording.version(record), wording.processor(record),
                ", ".join(record["cuda_archs"]) or "none", str(record["jobs"]),
                wording.duration(record["seconds"]),
                _against(record["processor_seconds"], computed, wording.duration),
                *(
                    _against(_weight(record, name), [_weight(one, name) for one in alike],
                             wording.size)
                    for name in ("_ops.so", "_C.so")
                ),
            ]
        )  # fmt: skip
    why = (
        f"A mark says that a figure grew by {100 * history.THRESHOLD:.0f} % or more over the best "
        "build before it of the same CUDA sets, for processor time also on the same processor."
    )
    header = ["date", "code", "machine", "CUDA sets", "at once", "took", "processor time",
              "_ops.so", "_C.so"]  # fmt: skip
    runs = list(kept.builds[-1:])
    yield Card("Builds over time", "", Table(header, rows, 5), notes=[why], records=runs)


def _weight(record: dict[str, Any], name: str) -> int | None:
    return next((one["bytes"] for one in record["libraries"] if one["name"] == name), None)


def _against(
    now: float | None, before: Sequence[float | None], shown: Callable[[float], str]
) -> str:
    """A figure, marked where it grew."""
    if now is None:
        return "–"
    best = min((one for one in before if one is not None), default=None)
    if best is None or now < (1 + history.THRESHOLD) * best:
        return shown(now)
    return f"{shown(now)} **{wording.percent(now / best - 1, 0)}**"


def checks(kept: Kept) -> Iterator[Card]:
    """What ``make gpu-check`` found, the newest first."""
    records = [record for record in reversed(kept.checks) if record["device"] == "cuda"]
    if records:
        failed = [
            f"{record['name']}, {name}: {part['reason']}"
            for record in records
            for name, part in record["parts"].items()
            if part.get("reason")
        ]
        yield Card("Every part", "", tables.checks(records), notes=failed, records=records)


# From run to run


def changes(kept: Kept, place: Place) -> Iterator[Card]:
    """What became faster or slower, worst first."""
    found = history.series(kept, place)
    if not found:
        return
    order = (history.SLOWER, history.FASTER, history.STEADY)
    rows = []
    for one in sorted(found, key=lambda one: order.index(one.verdict)):
        times = [wording.seconds(point.seconds) for point in one.points]
        commits = [(point.run.facts.get("commit") or "unknown")[:7] for point in one.points]
        drift = "–" if one.drift is None else wording.percent(one.drift, 0)
        steady = one.verdict == history.STEADY
        rows.append(
            [
                one.label, f"{commits[0]} → {commits[-1]}", " → ".join(times),
                wording.percent(one.changes[-1], 0), drift,
                one.verdict if steady else f"**{one.verdict}**",
            ]
        )  # fmt: skip
    header = ["case", "code", "took", "against the best before", "its yardstick", "verdict"]
    worse = sum(one.verdict == history.SLOWER for one in found)
    title = "no regression" if worse == 0 else f"{worse} of {len(found)} slower"
    runs = _records(point.run for one in found for point in one.points)
    yield Card(title, place.label, Table(header, rows, 4), records=runs)


# Where everything comes from


def where(kept: Kept, present: Mapping[str, Any] | None) -> Iterator[Card]:
    """What ran where: every file of the folder."""
    rows = []
    for record in [*(run.record for run in kept.runs), *kept.records]:
        machine = record.get("machine", {})
        driver = f"driver {machine['driver']}" if machine.get("driver") else None
        place = [wording.processor(record), machine.get("instructions"), machine.get("system")]
        versions = (f"{key} {value}" for key, value in record.get("versions", {}).items())
        rows.append(
            [
                f"`{record['name']}`", record["date"][:10],
                ", ".join(filter(None, [*place, driver])),
                ", ".join(versions), f"`{wording.command(record)}`",
                f"{wording.version(record)}, {_source(record, present)}",
            ]
        )  # fmt: skip
    yield Card("", "", Table(["file", "date", "machine", "software", "command", "code"], rows))


def _source(record: dict[str, Any], present: Mapping[str, Any] | None) -> str:
    """The hash of what was measured, and whether it is what lies here."""
    measured = record.get("csrc_sha256")
    if measured is None:
        return "csrc/ unknown"
    now = ""
    if present is not None:
        same = measured == present["csrc_sha256"]
        now = ", **as now**" if same else ", not as now"
        if sources.is_current(record, present) and not same:
            now = ", **as now in all that matters here**"
    return f"csrc/ `{measured[:10]}`{now}"


#: Headings of :func:`every_row`.
RECORD = ("case", "who", "median", "best", "spread", "samples", "GB/s", "error", "disturbed")


def every_row(run: Run) -> Iterator[tuple[str, str, str, list[tuple[float | int | None, str]]]]:
    """Every row of a run: its case, who, why it was not timed, and figures, exact and in words."""
    for row in run.rows:
        who = row.contestant if isinstance(row, Result) else f"{row.contestant} {row.residual}"
        if not row.seconds:
            yield row.case, who, f"{row.status}: {row.reason}", []
            continue
        rate = row.bandwidth if isinstance(row, Result) else None
        count = len(row.samples)
        figures: list[tuple[float | int | None, Callable[[Any], str]]] = [
            (row.seconds, wording.seconds),
            (row.best_seconds, wording.seconds),
            (row.spread, _share),
            (count, lambda n, t=row.timer: str(n) if t == "clock" else f"{n}, {t}"),
            (rate, lambda rate: f"{rate / 1e9:.1f}"),
            (row.error, lambda error: f"{error:.2f}"),
            (row.preemptions, str),
        ]
        yield row.case, who, "", [(v, "–" if v is None else shown(v)) for v, shown in figures]
