"""The two pictures of a run: how the arms learnt, and where depth attention looks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from attnres_ext.training.loop import Record
from attnres_ext.training.plot_style import COLOURS, GRID, STYLE, head, save

# Wider tables have no room for figures in their cells, nor for a name under each column.
_MOST_NAMED = 40


@dataclass(frozen=True)
class DepthMap:
    """Depth-attention weights of one arm.

    Attributes:
        arm: Residual mode.
        sites: Name of each site, in order of depth, such as "3 attn"; the output site last.
        sources: For each site, the names of its sources.
        weights: For each site, the mean weight of each of its sources.
    """

    arm: str
    sites: Sequence[str]
    sources: Sequence[Sequence[str]]
    weights: Sequence[Sequence[float]]


def plot_loss(path: Path, records: Sequence[Record], title: str) -> None:
    """Draws training and validation loss of every arm over steps; seeds are averaged.

    Left: the curves. Right, when the standard residual is among the arms: how far each other arm's
    validation loss is from it, which the curves are too steep to show.

    Args:
        path: PNG to write.
        records: A run's metrics.
        title: What was trained, for the figure's heading.
    """
    arms = list(dict.fromkeys(record.arm for record in records))
    others = [arm for arm in arms if arm != "standard"]
    compare = "standard" in arms and bool(others)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11 if compare else 7, 4.4), dpi=150, layout="constrained")
        head(figure, title)
        axes = figure.subplots(1, 1 + compare, width_ratios=[3, 2] if compare else None)
        left = axes[0] if compare else axes
        _draw_losses(left, records, arms)
        if compare:
            _draw_differences(axes[1], records, others)
        save(figure, path)


def _draw_losses(axes: Axes, records: Sequence[Record], arms: Sequence[str]) -> None:
    finals = []
    for arm in arms:
        colour = COLOURS[arm]
        steps, losses = _mean_by_step(records, arm, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=1.6, label=f"{arm}, train")
        steps, losses = _mean_by_step(records, arm, "val_loss")
        label = f"{arm}, validation: {losses[-1]:.3f}" if losses else None
        axes.plot(
            steps, losses, color=colour, linestyle="none", marker="o", markersize=4.5,
            markerfacecolor="white", markeredgewidth=1.4, label=label, zorder=3,
        )  # fmt: skip
        finals += losses[-1:]
    axes.set_title("Loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, nats per token")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", **GRID)
    axes.legend(frameon=False, fontsize=9)
    # The first steps fall from ln(vocabulary); most of the picture belongs to what follows.
    shown = [record.loss for record in records if record.loss is not None]
    if shown and finals:
        low = min(*finals, *shown)
        high = float(np.quantile(shown, 0.93))
        if high > low:
            axes.set_ylim(low - 0.04 * (high - low), high + 0.1 * (high - low))


def _draw_differences(axes: Axes, records: Sequence[Record], arms: Sequence[str]) -> None:
    _, standard = _mean_by_step(records, "standard", "val_loss")
    for arm in arms:
        steps, losses = _mean_by_step(records, arm, "val_loss")
        differences = [mine - theirs for mine, theirs in zip(losses, standard, strict=True)]
        axes.plot(
            steps, differences, color=COLOURS[arm], linewidth=1.6,
            marker="o", markersize=4.5, markerfacecolor="white", markeredgewidth=1.4,
            label=f"{arm}: {differences[-1]:+.4f}" if differences else arm,
        )  # fmt: skip
    axes.axhline(0, color=COLOURS["standard"], linewidth=1.2, label="standard")
    axes.set_title("Validation loss minus standard")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token, below 0 is better")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", **GRID)
    axes.legend(frameon=False, fontsize=9)


def _mean_by_step(records: Sequence[Record], arm: str, field: str) -> tuple[list[int], list[float]]:
    values: dict[int, list[float]] = {}
    for record in records:
        value = getattr(record, field)
        if record.arm == arm and value is not None:
            values.setdefault(record.step, []).append(value)
    steps = sorted(values)
    return steps, [fmean(values[step]) for step in steps]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over 8 % of the run; the window narrows towards both ends."""
    half = max(1, len(values) // 25)
    smoothed = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        smoothed.append(fmean(values[i - reach : i + reach + 1]))
    return smoothed


def plot_depth_attention(
    path: Path, maps: Sequence[DepthMap], title: str, over: str = "held-out tokens"
) -> None:
    """Draws the mean depth-attention weights, sites down and sources across, a panel per arm.

    A block that is still open at a site stands in its own column, in a dashed frame.
    Corresponds to Fig. 8 of the Attention Residuals paper.

    Args:
        path: PNG to write.
        maps: The arms' weights; standard arms have none and are left out by the caller.
        title: What was trained, for the figure's heading.
        over: What weights are averaged over.
    """
    tables = [_table(depth_map) for depth_map in maps]
    widths = [1.9 + 0.42 * min(len(columns), _MOST_NAMED) for columns, _, _ in tables]
    rows = min(max(len(depth_map.sites) for depth_map in maps), 2 * _MOST_NAMED)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(max(6.5, sum(widths) + 0.9), 1.9 + 0.27 * rows), dpi=150, layout="constrained"
        )
        head(figure, title)
        panels = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
        for axes, depth_map, table in zip(panels, maps, tables, strict=True):
            image = _draw_map(axes, depth_map, *table)
        bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.set_label(f"mean weight over {over}")
        bar.outline.set_visible(False)
        save(figure, path)


def _table(depth_map: DepthMap) -> tuple[list[str], np.ndarray, list[tuple[int, int]]]:
    """Columns, weights ``[sites, columns]`` (NaN: no such source) and the cells of open blocks."""
    columns: list[str] = []
    open_cells = []
    cells: dict[tuple[int, int], float] = {}
    for row, (sources, weights) in enumerate(
        zip(depth_map.sources, depth_map.weights, strict=True)
    ):
        for position, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            # The open block will be known by the name of the column after the closed ones.
            if source == "partial":
                source = f"block {position}"
                open_cells.append((row, position))
            if source not in columns:
                columns.append(source)
            cells[row, columns.index(source)] = weight
    table = np.full((len(depth_map.sites), len(columns)), math.nan)
    for cell, weight in cells.items():
        table[cell] = weight
    return columns, table, open_cells


def _draw_map(
    axes: Axes,
    depth_map: DepthMap,
    columns: Sequence[str],
    table: np.ndarray,
    open_cells: Sequence[tuple[int, int]],
):
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), weight in np.ndenumerate(table):
        if len(columns) <= _MOST_NAMED and not math.isnan(weight):
            # White on dark, dark on light.
            colour = "white" if weight > 0.6 else "#333333"
            axes.text(
                column, row, f"{100 * weight:.0f}",
                ha="center", va="center", fontsize=7, color=colour,
            )  # fmt: skip
    for row, column in open_cells:
        frame = Rectangle(
            (column - 0.46, row - 0.44), 0.92, 0.88,
            fill=False, linestyle=(0, (2, 1.5)), linewidth=0.8, edgecolor="#555555",
        )  # fmt: skip
        axes.add_patch(frame)
    axes.set_facecolor("#F4F4F4")
    for set_ticks, names, look in (
        (axes.set_xticks, columns, {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}),
        (axes.set_yticks, depth_map.sites, {}),
    ):
        every = -(-len(names) // _MOST_NAMED)
        set_ticks(range(0, len(names), every), names[::every], **look)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    note = "\ndashed: the block is still open" if open_cells else ""
    axes.set_xlabel(f"source: what earlier layers wrote{note}")
    axes.set_ylabel("site: who reads, from first to last")
    axes.set_title(f"{depth_map.arm}, weight in %", fontsize=10)
    return image


def average_maps(maps: Sequence[DepthMap]) -> DepthMap:
    """The mean of one mode's maps over seeds."""
    weights = [
        [fmean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*(depth_map.weights for depth_map in maps), strict=True)
    ]
    return DepthMap(maps[0].arm, maps[0].sites, maps[0].sources, weights)


def maps_by_arm(maps: Mapping[str, Sequence[DepthMap]]) -> list[DepthMap]:
    """One map per mode, averaged over its seeds."""
    return [average_maps(of_arm) for of_arm in maps.values() if of_arm]
