"""Whose colour is whose. Colours are in style.css; everything is also labelled where it stands."""

from __future__ import annotations

_SERIES = {
    "ours": "s-ours",
    "eager": "s-eager",
    "compile": "s-compile",
    "compile-max": "s-compile",
    "standard": "s-standard",
    "standard-fused": "s-standard",
    "copy": "s-standard",
    "fla": "s-triton",
    "fla-keep": "s-triton",
    "fla-gluon": "s-triton",
    "liger": "s-liger",
}


def series(contestant: str) -> str:
    """The class of a contestant's marks."""
    return _SERIES.get(contestant, "s-other")
