"""What all parts of the page share: sections, figures, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.html import Content, Html, tag
from attnres_ext.benchmarks.report.kept import Run


def section(ident: str, title: str, intro: Content, *content: Content) -> Html:
    """A part of the page with its heading."""
    return tag(
        "section",
        tag("h2", title, id=f"{ident}-heading"),
        tag("p", intro, class_="intro") if intro else None,
        content,
        id=ident,
        aria_labelledby=f"{ident}-heading",
    )


def figure(title: Content, content: Content, *sources: Html | None) -> Html:
    """A chart or table, its heading, and the commands that made it."""
    return tag(
        "figure",
        tag("h3", title) if title else None,
        content,
        tag("figcaption", [source for source in sources if source is not None]),
    )


def source(record: dict[str, Any], name: str) -> Html:
    """The command that made a record, when, and of which code."""
    return tag(
        "p",
        tag("code", wording.command(record), class_="command"),
        tag(
            "span",
            f"{record['date'][:10]}, {wording.version(record)}, {name}",
        ),
        tag("span", f" {record['note']}") if record.get("note") else None,
        class_="source",
    )


def sources(runs: Iterable[Run]) -> list[Html]:
    """The commands behind a figure, each once, oldest first."""
    unique = {run.name: run for run in runs}
    return [
        source(run.facts, run.name) for run in sorted(unique.values(), key=lambda run: run.date)
    ]


def code(text: str) -> Html:
    """A name from the code."""
    return tag("code", text)


def reason(status: str, why: str) -> Html:
    """In the place of a figure: why there is none."""
    words = {
        "absent": "not here",
        "unsupported": "does not do this",
        "failed": "failed",
        "wrong": "refused: wrong results",
    }
    kind = "bad" if status in ("failed", "wrong") else "missing"
    return tag(
        "span", tag("b", words.get(status, status)), f": {why}" if why else None, class_=kind
    )
