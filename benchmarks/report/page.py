"""The page as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_ext.benchmarks.report.html import Html, tag
from attnres_ext.benchmarks.report.kept import Kept
from attnres_ext.benchmarks.report.notices import notices
from attnres_ext.benchmarks.report.sections import (
    build,
    changes,
    checks,
    glance,
    host,
    models,
    overhead,
    records,
    rivals,
    roof,
    where,
)

_FOLDER = Path(__file__).parent

#: What the list of contents calls each part, in the order of the page.
CONTENTS = {
    "rivals": "Others",
    "roof": "Roof",
    "overhead": "Overhead",
    "models": "Models",
    "host": "Calls",
    "build": "Build",
    "history": "History",
    "checks": "GPU checks",
    "where": "Machines",
    "records": "Records",
}


def render(kept: Kept, present: Mapping[str, Any] | None, command: str) -> str:
    """The page.

    Args:
        kept: what to show.
        present: hashes of the present sources (:func:`attnres_ext.benchmarks.sources.hashes`), to
            say which results are of older code; None where there are no sources.
        command: that made the page.
    """
    parts = {
        "rivals": rivals.section(kept),
        "roof": roof.section(kept),
        "overhead": overhead.section(kept),
        "models": models.section(kept),
        "host": host.section(kept),
        "build": build.section(kept),
        "history": changes.section(kept),
        "checks": checks.section(kept),
        "where": where.section(kept, present),
        "records": records.section(kept),
    }
    shown = {ident: drawn for ident, drawn in parts.items() if drawn}
    body = [
        _header(shown),
        tag(
            "main",
            _notices(kept, present),
            glance.section(kept),
            list(shown.values()),
            id="main",
        ),
        tag(
            "footer",
            tag("p", "Made by ", tag("code", command), "; ", _code_shown(present), "."),
            tag(
                "p",
                "How everything is measured: ",
                tag("code", "benchmarks/README.md"),
                ". What limits each operator: ",
                tag("code", "docs/performance.md"),
                ".",
            ),
        ),
        tag("script", Html((_FOLDER / "sort.js").read_text())),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", "attnres-ext: benchmarks"),
        tag("style", Html((_FOLDER / "style.css").read_text())),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _header(shown: dict[str, Html]) -> Html:
    links = [tag("a", name, href=f"#{ident}") for ident, name in CONTENTS.items() if ident in shown]
    return tag(
        "header",
        tag("p", "attnres-ext", class_="project"),
        tag("h1", "Is it faster, by how much, and how close to the limit?"),
        tag("nav", links, aria_label="Parts of this page"),
    )


def _notices(kept: Kept, present: Mapping[str, Any] | None) -> Html | None:
    said = notices(kept, present)
    if not said:
        return None
    items = [tag("li", sentence) for sentence in said]
    return tag("ul", items, id="notices", aria_label="What to mind")


def _code_shown(present: Mapping[str, Any] | None) -> Html | str:
    if present is None:
        return "no sources here to compare with"
    return Html(f"present csrc/ {tag('code', present['csrc_sha256'][:10])}")
