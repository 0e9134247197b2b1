"""What `make gpu-check` found."""

from __future__ import annotations

from typing import Any

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.frame import figure, source
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, table, tag
from attnres_ext.benchmarks.report.kept import Kept


def section(kept: Kept) -> Html | None:
    """A table for each check, the newest first."""
    if not kept.checks:
        return None
    return part(
        "checks",
        "Checked on a GPU",
        "Tests, memory and race checkers and the benchmark on a GPU, with the sources they were "
        "compiled from.",
        [_check(record) for record in reversed(kept.checks)],
    )


def _check(record: dict[str, Any]) -> Html:
    rows = [_row(name, entry) for name, entry in record["parts"].items()]
    drawn = table(
        ["part", "outcome", "tests", "reason", "took"],
        rows,
        numbers=1,
        caption=f"Parts of {record['name']}",
    )
    outcome = "everything passed" if record.get("passed") else "not everything passed"
    if "library_sets" in record:
        outcome += f", in a library of {' and '.join(f'sm{one}' for one in record['library_sets'])}"
    heading = [wording.processor(record), tag("small", outcome)]
    return figure(heading, drawn, source(record, record["name"]))


def _row(name: str, entry: dict[str, Any]) -> list[Content]:
    status = entry["status"]
    kind = {"passed": "good", "unavailable": "missing"}.get(status, "bad")
    counts = ", ".join(
        f"{count} {outcome}" for outcome, count in sorted(entry.get("counts", {}).items())
    )
    took = wording.duration(entry["seconds"]) if entry.get("seconds") else "–"
    return [name, tag("b", status, class_=kind), counts or "–", entry.get("reason") or "–", took]
