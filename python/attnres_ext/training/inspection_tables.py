"""An inspection as CSV: every figure that a picture shows, by name."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attnres_ext.training.files import write_text
from attnres_ext.training.inspection import Inspection


def write_tables(folder: Path, inspections: Sequence[Inspection]) -> None:
    """Writes ``depth_attention.csv``, ``sites.csv`` and ``sublayers.csv``, each in one step.

    Args:
        folder: Where to.
        inspections: One per arm; see :mod:`attnres_ext.training.inspection` for units.
    """
    _write(
        folder / "depth_attention.csv",
        ("arm", "site", "name", "source", "mean_weight", "share_of_tokens_with_it_on_top"),
        (
            (i.arm, number, site.name, *cells)
            for i in inspections
            for number, site in enumerate(i.sites)
            for cells in zip(site.sources, site.weights, site.top_shares, strict=True)
        ),
    )
    _write(
        folder / "sites.csv",
        ("arm", "site", "name", "sources", "entropy_nats", "entropy_share", "top", "top_weight"),
        (
            (
                i.arm, number, site.name, len(site.sources), site.entropy, site.evenness,
                site.sources[site.top], site.weights[site.top],
            )
            for i in inspections
            for number, site in enumerate(i.sites)
        ),
    )  # fmt: skip
    _write(
        folder / "sublayers.csv",
        ("arm", "depth", "name", "block", "output_rms", "state_rms", "gradient_rms"),
        (
            (i.arm, number, depth.name, depth.block, depth.output, depth.state, depth.gradient)
            for i in inspections
            for number, depth in enumerate(i.depths)
        ),
    )


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in row])
    write_text(path, text.getvalue())
