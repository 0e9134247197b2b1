"""Figures as tables of words: the documentation shows them as Markdown, the report as HTML.

Needs nothing that is compiled, so that documents can be checked anywhere. Cells may have `code` and
**bold** in them, as in Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from . import wording
from .results import ModelResult, Result

#: Results of one case, by who ran.
Rows = dict[str, Result]

#: From this share of a copy's bandwidth on, the memory is the limit; below the other, arithmetic.
MEMORY, ARITHMETIC = 0.75, 0.45
#: A call that takes less than this many calls on tiny tensors is mostly the call.
CALLS = 3.0
_WIDE = {"bf16": "fp32", "fp16": "fp32"}


class Table(NamedTuple):
    """Headings, rows, and how many of the last columns are figures."""

    header: list[str]
    rows: list[list[str]]
    numbers: int = 0


def by_case(rows: Iterable[Result]) -> dict[str, Rows]:
    """Results by case and who ran, in the order of the cases."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.contestant] = row
    return found


def operators(cases: Iterable[Rows], rivals: Sequence[str]) -> tuple[Table, list[str]]:
    """Our times against a copy of the same bytes and against others, and who failed, and why."""
    rows: list[list[str]] = []
    failures: dict[str, list[str]] = {}
    for found in cases:
        ours = found.get("ours")
        if ours is None:
            continue
        cells = _case(ours)
        if ours.seconds is None:
            rows.append([*cells, ours.status, *["–"] * (2 + len(rivals))])
            # Before it, an error names the shapes, which stand here anyway.
            why = ours.reason.rsplit(": ", 1)[-1]
            failures.setdefault(why, []).append(" ".join(cells))
            continue
        copy = seconds_of(found, "copy")
        cells.append(wording.seconds(ours.seconds))
        cells.append(f"{ours.bandwidth / 1e9:.1f}" if copy and ours.bandwidth else "–")
        cells.append(f"{100 * copy / ours.seconds:.0f} %" if copy else "–")
        for name in rivals:
            other = seconds_of(found, name)
            cells.append(_times(other / ours.seconds) if other else "–")
        rows.append(cells)
    header = ["operator", "case", "one call", "time", "GB/s", "of copy"]
    header += [f"{wording.baseline(name)} takes" for name in rivals]
    said = [f"Failed: {', '.join(which)}: {why}." for why, which in failures.items()]
    return Table(header, rows, 3 + len(rivals)), said


def seconds_of(found: Rows, name: str) -> float | None:
    """What somebody took, if anything was measured."""
    return found[name].seconds if name in found else None


def _case(row: Result) -> list[str]:
    return [f"`{row.operator}`", row.shape, row.work]


def _times(ratio: float) -> str:
    return f"{ratio:.{1 if ratio >= 2 else 2}f} ×"


def limits(cases: dict[str, Rows]) -> Table:
    """Derived bytes of every case, what moving them took, and what that says of the limit."""
    call: dict[str, float] = {}
    for found in cases.values():
        ours = found.get("ours")
        if ours is not None and ours.origin == "host" and ours.seconds:
            call[ours.operator] = min(ours.seconds, call.get(ours.operator, ours.seconds))
    order = list(dict.fromkeys(next(iter(found.values())).operator for found in cases.values()))
    measured = [
        (found["ours"], copy)
        for found in cases.values()
        if (copy := seconds_of(found, "copy")) and seconds_of(found, "ours")
    ]
    rows = []
    for ours, copy in sorted(measured, key=lambda one: order.index(one[0].operator)):
        share = copy / ours.seconds
        narrow = _against_wide(ours, cases)
        rows.append(
            [
                *_case(ours),
                wording.size(ours.bytes),
                wording.seconds(ours.seconds),
                f"{100 * share:.0f} %",
                "–" if narrow is None else f"{100 * narrow:.0f} %",
                _limit(share, ours.seconds, call.get(ours.operator), narrow),
            ]
        )
    header = ["operator", "case", "one call", "bytes", "time", "of copy", "of fp32's time", "limit"]
    return Table(header, rows)


def _limit(share: float, seconds: float, call: float | None, narrow: float | None) -> str:
    if call is not None and seconds < CALLS * call:
        return "the call"
    if share >= MEMORY:
        return "memory"
    # Half of the bytes in as much time: what takes the time is done once for each element.
    if share < ARITHMETIC or (narrow is not None and narrow > MEMORY):
        return "arithmetic"
    return "memory and arithmetic"


def _against_wide(ours: Result, cases: dict[str, Rows]) -> float | None:
    """Our time over that of the same case with elements of twice the width."""
    short = ours.shape.split()[-1]
    if short not in _WIDE:
        return None
    wide = seconds_of(cases.get(ours.case.replace(short, _WIDE[short]), {}), "ours")
    return ours.seconds / wide if wide else None


def host(cases: Iterable[Rows]) -> Table:
    """What a call costs on tensors so small that nothing else is left."""
    rows = []
    for found in cases:
        ours = found.get("ours")
        if ours is None or ours.origin != "host" or not ours.seconds:
            continue
        others = (seconds_of(found, name) for name in ("eager", "compile"))
        cells = [*_case(ours), wording.seconds(ours.seconds), f"{1 / ours.seconds:,.0f}"]
        rows.append([*cells, *(wording.seconds(other) if other else "–" for other in others)])
    header = ["operator", "case", "one call", "takes", "calls per second"]
    return Table([*header, "plain PyTorch", "torch.compile"], rows, 4)


def models(rows: Iterable[ModelResult]) -> Table:
    """Whole models: time, speed, memory, and overhead over the standard residual."""
    cells = []
    for row in rows:
        if not row.seconds:
            continue
        over = "yardstick"
        if row.overhead is not None:
            low, high = row.overhead_quartiles or (row.overhead, row.overhead)
            over = f"{wording.percent(row.overhead)} ({wording.percent(low)} to "
            over += f"{wording.percent(high)})"
        by = "attnres-ext" if row.contestant == "standard" else wording.baseline(row.contestant)
        cells.append(
            [
                row.work,
                row.shape,
                row.residual,
                by,
                wording.seconds(row.seconds),
                f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "–",
                wording.size(row.peak_bytes) if row.peak_bytes else "–",
                over,
            ]
        )
    header = ["work", "model", "residual", "by", "time", "tokens/s", "peak memory"]
    return Table([*header, "over standard"], cells, 4)


def build(record: dict[str, Any]) -> Table:
    """The longest steps of a build, and what the libraries weigh."""
    steps = sorted(record["steps"], key=lambda step: -step["seconds"])
    rows = [[f"`{s['target']}`", wording.duration(s["seconds"]), "–"] for s in steps[:6]]
    if rest := steps[6:]:
        together = wording.duration(sum(step["seconds"] for step in rest))
        rows.append([f"{len(rest)} more together", together, "–"])
    rows.append(["**all of it**", f"**{wording.duration(record['seconds'])}**", "–"])
    rows.append(["processor time", wording.duration(record["processor_seconds"]), "–"])
    for library in record["libraries"]:
        rows.append([f"**`{library['name']}`**", "–", f"**{wording.size(library['bytes'])}**"])
        for code in library["device_code"]:
            name = f"of it {code['arch']}, {code['kind']}"
            rows.append([name, "–", wording.size(code["bytes"])])
    return Table(["", "takes", "weighs"], rows, 2)


def training(record: dict[str, Any]) -> tuple[Table, str]:
    """What a training run came to, and what it was."""

    def shown(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    rows = []
    for one in record["arms"]:
        over = one["overhead"]
        rows.append(
            [
                one["arm"],
                f"{one['parameters']:,}",
                shown(one["val_loss"], 3),
                shown(one["bits_per_byte"], 3),
                shown(one["ms_per_step"], 0),
                f"{over['percent']:+.1f} % ({over['low']:+.1f} to {over['high']:+.1f})"
                if over
                else "–",
            ]
        )
    header = ["residual", "parameters", "validation loss", "bits per byte", "ms per step"]
    about = f"{record['steps']} steps of {record['tokens_per_step']:,} tokens on {record['text']}"
    return Table([*header, "over standard"], rows, 5), about


def checks(records: Iterable[dict[str, Any]]) -> Table:
    """Every part of every ``make gpu-check``."""
    rows = []
    for record in records:
        sets = ", ".join(f"sm{number}" for number in record.get("library_sets", ()))
        first = [record["date"][:16].replace("T", " "), record["machine"]["gpu"]]
        first += [wording.version(record), sets or "–"]
        for name, part in record["parts"].items():
            counts = part.get("counts", {})
            of = part.get("collected", sum(counts.values()))
            tests = f"{counts.get('passed', 0):,} of {of:,} passed" if of else ""
            failed = f"{counts['failed']:,} failed" if counts.get("failed") else ""
            rows.append([*first, name, part["status"], ", ".join(filter(None, [tests, failed]))])
    header = ["when", "GPU", "of", "sets in the library", "part", "outcome", "tests"]
    return Table(header, rows)
