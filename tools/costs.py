"""Tables of what limits an operator, what a call costs, and what a build costs.

Part of ``tools/figures.py``, which reads the results and hands them in. A table here is a heading,
rows, and how many of its last columns are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

Table = tuple[list[str], list[list[str]], int]

#: From this share of a copy's bandwidth on, the memory is the limit; below the other, arithmetic.
MEMORY, ARITHMETIC = 0.75, 0.45
#: A call that takes less than this many calls on tiny tensors is mostly the call.
CALLS = 3.0
_WIDE = {"bf16": "fp32", "fp16": "fp32"}


def limits(rows: Sequence[Any], cases: Sequence[Any], wording: ModuleType) -> Table:
    """Derived bytes of every case, what moving them took, and what that says of the limit."""
    by_case = _by_case(rows)
    call = _call_seconds(rows)
    table = []
    order = [case.operator for case in cases]
    for case in sorted(cases, key=lambda case: order.index(case.operator)):
        ours, copy = (by_case.get(case.name, {}).get(name) for name in ("ours", "copy"))
        if ours is None or copy is None or not ours.seconds or not copy.seconds:
            continue
        share = copy.seconds / ours.seconds
        narrow = _against_wide(case, ours, by_case)
        table.append(
            [
                f"`{case.operator}`",
                case.shape,
                case.work,
                wording.size(ours.bytes),
                wording.seconds(ours.seconds),
                f"{100 * share:.0f} %",
                "–" if narrow is None else f"{100 * narrow:.0f} %",
                _limit(share, ours.seconds, call.get(case.operator), narrow),
            ]
        )
    header = ["operator", "case", "one call", "bytes", "time", "of copy", "of fp32's time", "limit"]
    return header, table, 0


def _limit(share: float, seconds: float, call: float | None, narrow: float | None) -> str:
    if call is not None and seconds < CALLS * call:
        return "the call"
    if share >= MEMORY:
        return "memory"
    # Half of the bytes in as much time: what takes the time is done once for each element.
    if share < ARITHMETIC or (narrow is not None and narrow > MEMORY):
        return "arithmetic"
    return "memory and arithmetic"


def _against_wide(case: Any, ours: Any, by_case: dict[str, dict[str, Any]]) -> float | None:
    """Our time over that of the same case with elements of twice the width."""
    short = case.shape.split()[-1]
    if short not in _WIDE:
        return None
    wide = by_case.get(case.name.replace(short, _WIDE[short]), {}).get("ours")
    return ours.seconds / wide.seconds if wide is not None and wide.seconds else None


def _call_seconds(rows: Sequence[Any]) -> dict[str, float]:
    """The shortest call of each operator on tiny tensors."""
    found: dict[str, float] = {}
    for row in rows:
        if row.origin == "host" and row.contestant == "ours" and row.seconds:
            found[row.operator] = min(row.seconds, found.get(row.operator, row.seconds))
    return found


def host(rows: Sequence[Any], cases: Sequence[Any], wording: ModuleType) -> Table:
    """What a call costs on tensors so small that nothing else is left."""
    by_case = _by_case(rows)
    table = []
    for case in cases:
        found = by_case.get(case.name, {})
        ours = found.get("ours")
        if not case.is_host or ours is None or not ours.seconds:
            continue
        cells = [f"`{case.operator}`", case.shape, case.work, wording.seconds(ours.seconds)]
        cells.append(f"{1 / ours.seconds:,.0f}")
        for name in ("eager", "compile"):
            other = found.get(name)
            timed = other is not None and other.seconds
            cells.append(wording.seconds(other.seconds) if timed else "–")
        table.append(cells)
    header = ["operator", "case", "one call", "takes", "calls per second"]
    return [*header, "plain PyTorch", "torch.compile"], table, 4


def models(rows: Sequence[Any], wording: ModuleType) -> Table:
    """Whole models: time, speed, memory, and overhead over the standard residual."""
    table = []
    for row in rows:
        if not row.seconds:
            continue
        over = "yardstick"
        if row.overhead is not None:
            low, high = row.overhead_quartiles or (row.overhead, row.overhead)
            over = f"{wording.percent(row.overhead)} ({wording.percent(low)} to "
            over += f"{wording.percent(high)})"
        by = "attnres-ext" if row.contestant == "standard" else wording.contestant(row.contestant)
        table.append(
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
    return [*header, "over standard"], table, 4


def build(record: dict[str, Any], wording: ModuleType) -> Table:
    """The longest steps of a build, and what the libraries weigh."""
    steps = sorted(record["steps"], key=lambda step: -step["seconds"])
    rows = [[f"`{s['target']}`", wording.duration(s["seconds"]), "–"] for s in steps[:6]]
    rest = steps[6:]
    if rest:
        together = wording.duration(sum(step["seconds"] for step in rest))
        rows.append([f"{len(rest)} more together", together, "–"])
    rows.append(["**all of it**", f"**{wording.duration(record['seconds'])}**", "–"])
    rows.append(["processor time", wording.duration(record["processor_seconds"]), "–"])
    for library in record["libraries"]:
        rows.append([f"**`{library['name']}`**", "–", f"**{wording.size(library['bytes'])}**"])
        for code in library["device_code"]:
            name = f"of it {code['arch']}, {code['kind']}"
            rows.append([name, "–", wording.size(code["bytes"])])
    return ["", "takes", "weighs"], rows, 2


def _by_case(rows: Sequence[Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.contestant] = row
    return found
