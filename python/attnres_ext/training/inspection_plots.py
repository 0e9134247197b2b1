"""Pictures of an inspection: magnitudes and attention against depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from attnres_ext.training.inspection import Depth, Inspection
from attnres_ext.training.plot_style import COLOURS, GRID, STYLE, head, save

_DASHES = ("-", "--", ":", "-.")
_MOST_NAMED = 30
_BOUNDARY = {"color": "#888888", "linewidth": 0.8, "linestyle": (0, (1, 2))}


def plot_by_depth(path: Path, inspections: Sequence[Inspection], title: str) -> None:
    """Draws what an inspection measured at every depth, all arms in each panel.

    Corresponds to Fig. 5b and 5c of the Attention Residuals paper; the last panel is to Fig. 8
    what a total is to its parts.

    Args:
        path: PNG to write.
        inspections: The arms, of models with the same sublayers.
        title: What was inspected, for the figure's heading.
    """
    panels: list[tuple[str, str, Callable[[Depth], float]]] = [
        ("Sum that the sublayer writes to", "RMS, log scale", lambda depth: depth.state),
        ("Sublayer's own output", "RMS, log scale", lambda depth: depth.output),
        (
            "Gradient with respect to the output",
            "RMS, nats per unit, log scale",
            lambda depth: depth.gradient,
        ),
    ]
    count = len(inspections[0].depths)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(min(24, max(11, 0.42 * count + 4)), 8.2), dpi=130, layout="constrained"
        )
        head(figure, title)
        axes = figure.subplots(2, 2, sharex=True).flatten()
        for panel, (heading, unit, value) in zip(axes, panels, strict=False):
            for inspection, look in zip(inspections, _looks(inspections), strict=True):
                values = [value(depth) for depth in inspection.depths]
                panel.plot(range(count), values, marker="o", markersize=3.5, **look)
            panel.set_yscale("log")
            panel.set_title(heading)
            panel.set_ylabel(unit)
        _draw_evenness(axes[3], inspections)
        for panel in axes:
            _draw_depths(panel, inspections)
        if any(_ends_of_blocks(inspections)):
            axes[0].plot([], [], **_BOUNDARY, label="a block ends")
        axes[0].legend(frameon=False, fontsize=9)
        save(figure, path)


def _looks(inspections: Sequence[Inspection]) -> list[dict]:
    """Colour by residual mode, dashes by seed."""
    modes = [inspection.arm.split("-")[0] for inspection in inspections]
    return [
        {
            "color": COLOURS[mode],
            "linestyle": _DASHES[modes[:i].count(mode) % len(_DASHES)],
            "linewidth": 1.5,
            "label": inspection.arm,
        }
        for i, (mode, inspection) in enumerate(zip(modes, inspections, strict=True))
    ]


def _draw_evenness(axes: Axes, inspections: Sequence[Inspection]) -> None:
    axes.set_title("How evenly sites attend over depth")
    axes.set_ylabel("entropy of the weights, share of ln(sources)")
    for inspection, look in zip(inspections, _looks(inspections), strict=True):
        # A site stands where its sublayer does, the output's one further.
        points = [
            (place, site.evenness, site.name)
            for place, site in enumerate(inspection.sites, start=1)
            if site.evenness is not None
        ]
        if not points:
            continue
        axes.plot(
            [x for x, *_ in points],
            [y for _, y, _ in points],
            **{**look, "linewidth": 0.8, "label": None},
        )
        for marker, face, feeds in (
            ("o", look["color"], _feeds_attention),
            ("s", "white", lambda name: not _feeds_attention(name)),
        ):
            chosen = [(x, y) for x, y, name in points if feeds(name)]
            axes.plot(
                [x for x, _ in chosen], [y for _, y in chosen], linestyle="none", marker=marker,
                markersize=5, color=look["color"], markerfacecolor=face,
            )  # fmt: skip
    for marker, face, label in (
        ("o", "#333333", "attention"),
        ("s", "white", "feed-forward, output"),
    ):
        axes.plot(
            [], [], linestyle="none", marker=marker, color="#333333", markerfacecolor=face,
            label=f"site before {label}",
        )  # fmt: skip
    axes.set_ylim(-0.12, 1.05)  # room for the legend under 0 %
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, fontsize=9, loc="lower left", ncols=2)


def _feeds_attention(site: str) -> bool:
    return site.endswith(("kda", "mla"))


def _draw_depths(axes: Axes, inspections: Sequence[Inspection]) -> None:
    names = [*(depth.name for depth in inspections[0].depths), "output"]
    every = -(-len(names) // _MOST_NAMED)
    axes.set_xticks(
        range(0, len(names), every), names[::every],
        rotation=60, ha="right", rotation_mode="anchor", fontsize=8,
    )  # fmt: skip
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", **GRID)
    axes.set_axisbelow(True)
    for place in _ends_of_blocks(inspections):
        axes.axvline(place, **_BOUNDARY)


def _ends_of_blocks(inspections: Sequence[Inspection]) -> list[float]:
    """Where blocks end, between two sublayers; nowhere without an arm in block mode."""
    for inspection in inspections:
        if inspection.arm.startswith("block"):
            pairs = enumerate(pairwise(depth.block for depth in inspection.depths))
            return [place + 0.5 for place, (before, after) in pairs if before != after]
    return []
