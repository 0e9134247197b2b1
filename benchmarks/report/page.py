"""The page as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from .. import wording
from . import history, sections
from .kept import Kept
from .notices import notices


def render(kept: Kept, present: Mapping[str, Any] | None, command: str) -> str:
    """The page.

    Args:
        kept: what to show.
        present: hashes of the present sources (:func:`attnres_ext.sources.hashes`), to say which
            results are of older code; None where there are no sources.
        command: that made the page.
    """
    each = kept.places
    cards = {
        "operators": [card for at in each for card in sections.operators(kept, at)],
        "models": [
            *(card for at in each for card in sections.models(kept, at)),
            *sections.training(kept),
        ],
        "host": [card for at in each for card in sections.calls(kept, at)],
        "build": list(sections.builds(kept)),
        "history": [card for at in each for card in sections.changes(kept, at)],
        "checks": list(sections.checks(kept)),
        "where": list(sections.where(kept, present)),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = words
    return environment.get_template("page.html.jinja").render(
        cards={name: found for name, found in cards.items() if found or name == "history"},
        notices=notices(kept, present),
        glance=sections.glance(kept),
        runs=kept.runs[::-1],
        every_row=sections.every_row,
        record_header=sections.RECORD,
        threshold=history.THRESHOLD,
        wording=wording,
        present=present,
        command=command,
    )


def words(text: str) -> Markup:
    """`code` and **bold** of a cell."""
    safe = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", safe))
