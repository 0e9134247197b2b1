"""What all pictures share: colours, type, headings, and how they are written."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from attnres_ext.residual_variants import VARIANTS
from attnres_ext.training.files import write_bytes

# By residual mode. Okabe and Ito's: told apart by colour-blind readers and in grey print.
_COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
COLOURS = dict(zip(VARIANTS, _COLOURS, strict=False))
GRID = {"color": "#DDDDDD", "linewidth": 0.7}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def head(figure: Figure, title: str) -> None:
    """Sets a heading over the whole figure, wrapped to its width."""
    # Some 13 characters of this size fit an inch.
    text = textwrap.fill(title, int(13 * figure.get_figwidth()))
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, color="#333333")


def save(figure: Figure, path: Path) -> None:
    """Replaces ``path`` with the figure as a PNG, in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
