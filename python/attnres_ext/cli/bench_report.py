"""``attnres bench report``: the results of a folder as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnres_ext.cli.arguments import HelpFormatter
from attnres_ext.training.errors import UserError

_DESCRIPTION = """\
Draws what `attnres bench --out DIR` kept: speed-ups, distance from the memory's roof, overhead over
the standard residual, cost of a call, build time and size, and what changed from commit to commit.

The page is one file that needs no network.
"""


#: What the page is called, in the folder that it draws.
PAGE = "report.html"


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
        "--html", type=Path, metavar="FILE", help="the page (default: " + PAGE + " in DIR)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``attnres bench report``."""
    path = draw(args.folder, args.html or args.folder / PAGE, args.command_line)
    print(f"report: {path}")
    return 0


def draw(folder: Path, path: Path, command: str) -> Path:
    """Writes the page.

    Args:
        folder: of results.
        path: of the page.
        command: that draws it.

    Raises:
        UserError: nothing can be drawn, or written.
    """
    from attnres_ext.benchmarks import machine
    from attnres_ext.benchmarks.report.kept import ReportError, load
    from attnres_ext.benchmarks.report.page import render
    from attnres_ext.training.files import write_text

    try:
        page = render(load(folder), machine.source_hashes(), command)
    except ReportError as error:
        raise UserError(str(error)) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path
