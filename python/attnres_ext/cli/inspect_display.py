"""What a person sees of an inspection: a table per arm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from attnres_ext.training.inspection import Depth, Inspection, Site

# Width of tables that go to a file or a pipe.
_PLAIN_WIDTH = 110


def print_tables(inspections: Sequence[Inspection], title: str) -> None:
    """Prints a row per sublayer: what its site attends to, then how large what it wrote is."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH, highlight=False)
    console.print(title, markup=False)
    for inspection in inspections:
        console.print(_table(inspection))
    console.print(
        "entropy: of a token's weights, and as a share of the most it could be; top: the source "
        "with the largest mean weight; output, sum, gradient: RMS of what the sublayer wrote, of "
        "what it was added to, and of d(loss)/d(output)",
        markup=False,
    )


def _table(inspection: Inspection) -> Table:
    table = Table(
        title=f"{inspection.arm}: {inspection.loss:.4f} nats per token",
        title_justify="left",
        box=SIMPLE_HEAD,
        # The embedding's row is the first and has no site: the site of row i is i - 1.
    )
    table.add_column("sublayer", no_wrap=True)
    if inspection.sites:
        table.add_column("entropy", justify="right", no_wrap=True)
        table.add_column("top source", no_wrap=True)
        table.add_column("weight", justify="right", no_wrap=True)
    for heading in ("output", "sum", "gradient"):
        table.add_column(heading, justify="right", no_wrap=True)
    # The embedding has no site, the output site no sublayer.
    for depth, site in zip_longest(inspection.depths, [None, *inspection.sites]):
        cells = _site_cells(site) if inspection.sites else []
        table.add_row(depth.name if depth else site.name, *cells, *_depth_cells(depth))
    return table


def _site_cells(site: Site | None) -> list[str]:
    if site is None:
        return ["", "", ""]
    share = "" if site.evenness is None else f" {100 * site.evenness:3.0f} %"
    return [
        f"{site.entropy:.2f}{share or '      '}",
        site.sources[site.top],
        f"{100 * site.weights[site.top]:.0f} %",
    ]


def _depth_cells(depth: Depth | None) -> list[str]:
    if depth is None:
        return ["", "", ""]
    return [f"{value:.3g}" for value in (depth.output, depth.state, depth.gradient)]
