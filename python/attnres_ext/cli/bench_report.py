"""``attnres bench report``: the results of a folder as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnres_ext.cli.arguments import HelpFormatter

_DESCRIPTION = """\
Draws what `attnres bench --out DIR` kept: speed-ups, distance from the memory's roof, overhead over
the standard residual, cost of a call, build time and size, and what changed from commit to commit.

The page is one file that needs no network.
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``report`` to the parser of ``attnres bench``."""
    parser = subparsers.add_parser(
        "report",
        help="draw the results of a folder as one HTML page",
        description=_DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `--out` named")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="the page (default: report.html in DIR)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page."""
    from attnres_ext.benchmarks import machine
    from attnres_ext.benchmarks.report.kept import ReportError, load
    from attnres_ext.benchmarks.report.page import render
    from attnres_ext.training.errors import UserError
    from attnres_ext.training.files import write_text

    path = args.html or args.folder / "report.html"
    try:
        page = render(load(args.folder), machine.source_hashes(), args.command_line)
    except ReportError as error:
        raise UserError(str(error)) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    print(f"report: {path}")
    return 0
