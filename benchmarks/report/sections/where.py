"""What ran where: every file of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnres_ext.benchmarks import sources, wording
from attnres_ext.benchmarks.report.frame import code
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, table, tag
from attnres_ext.benchmarks.report.kept import Kept


def section(kept: Kept, present: Mapping[str, Any] | None) -> Html:
    """A row for each file."""
    rows = [_row(run.name, run.facts, run.place.label, present) for run in kept.runs]
    rows += [
        _row(record["name"], record, wording.processor(record), present) for record in kept.records
    ]
    drawn = table(
        ["file", "machine", "software", "command", "code"],
        rows,
        caption="Files, machines and versions",
    )
    return part(
        "where",
        "What ran where",
        "Every figure on this page comes from one of these files.",
        tag("figure", drawn, class_="files"),
    )


def _row(
    name: str, facts: dict[str, Any], place: str, present: Mapping[str, Any] | None
) -> list[Content]:
    machine, versions = facts.get("machine", {}), facts.get("versions", {})
    details = [machine.get("instructions"), machine.get("system")]
    if machine.get("driver"):
        details.append(f"driver {machine['driver']}")
    return [
        [code(name), tag("small", facts["date"][:10])],
        [place, tag("small", ", ".join(str(part) for part in details if part))],
        tag("small", ", ".join(f"{key} {value}" for key, value in versions.items())),
        code(wording.command(facts)),
        [wording.version(facts), tag("small", "csrc/ ", *_sources(facts, present))],
    ]


def _sources(facts: dict[str, Any], present: Mapping[str, Any] | None) -> list[Content]:
    """The hash of what was measured, and whether it is what lies here."""
    measured = facts.get("csrc_sha256")
    if measured is None:
        return ["unknown"]
    shown: list[Content] = [code(measured[:10])]
    if present is None:
        return shown
    if measured == present["csrc_sha256"]:
        shown.append(tag("b", ", as now", class_="good"))
    elif sources.is_current(facts, present):
        shown.append(tag("b", ", as now in all that matters here", class_="good"))
    else:
        shown.append(", not as now")
    return shown
