"""What ran where: every file of the folder."""

from __future__ import annotations

from typing import Any

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.frame import code
from attnres_ext.benchmarks.report.frame import section as part
from attnres_ext.benchmarks.report.html import Content, Html, table, tag
from attnres_ext.benchmarks.report.kept import Kept


def section(kept: Kept, csrc_sha256: str | None) -> Html:
    """A row for each file."""
    rows = [_row(run.name, run.facts, run.place.label, csrc_sha256) for run in kept.runs]
    rows += [
        _row(record["name"], record, wording.processor(record), csrc_sha256)
        for record in kept.records
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


def _row(name: str, facts: dict[str, Any], place: str, csrc_sha256: str | None) -> list[Content]:
    machine, versions = facts.get("machine", {}), facts.get("versions", {})
    details = [machine.get("instructions"), machine.get("system")]
    if machine.get("driver"):
        details.append(f"driver {machine['driver']}")
    return [
        [code(name), tag("small", facts["date"][:10])],
        [place, tag("small", ", ".join(str(part) for part in details if part))],
        tag("small", ", ".join(f"{key} {value}" for key, value in versions.items())),
        code(wording.command(facts)),
        [wording.version(facts), tag("small", "csrc/ ", *_sources(facts, csrc_sha256))],
    ]


def _sources(facts: dict[str, Any], csrc_sha256: str | None) -> list[Content]:
    """The hash of what was measured, and whether it is what lies here."""
    measured = facts.get("csrc_sha256")
    if measured is None:
        return ["unknown"]
    shown: list[Content] = [code(measured[:10])]
    if measured == csrc_sha256:
        shown.append(tag("b", ", as now", class_="good"))
    elif csrc_sha256 is not None:
        shown.append(", not as now")
    return shown
