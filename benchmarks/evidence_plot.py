"""Draws what evidence runs came to.

    python -m attnres_ext.benchmarks.evidence_plot benchmarks/results/evidence-deep-narrow.json \\
        docs/images/evidence-deep-narrow.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from attnres_ext.training.plot_style import COLOURS, GRID, STYLE, head, save

from .evidence_summary import Variant, complete_seeds, summarize

_MARKERS = {"standard": "s", "block": "o", "full": "^"}


def plot(path: Path, record: dict[str, Any]) -> None:
    """Left: losses over learning rates, a mark per seed. Right: differences, seed by seed.

    Args:
        path: PNG to write.
        record: What ``benchmarks/evidence.py`` keeps, with at least one complete seed.
    """
    variants, design = summarize(record), record["design"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), dpi=130, layout="constrained")
        tokens = design["batch_size"] * design["sequence_length"]
        head(
            figure,
            f"{record['name']}: {2 * design['model']['num_hidden_layers']} sublayers of "
            f"{design['model']['hidden_size']} channels, {design['steps']} steps of {tokens:,} "
            f"tokens on {record['text']}, {len(complete_seeds(record))} seeds",
        )
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_sweep(left, variants)
        _draw_differences(right, variants)
        save(figure, path)


def _draw_sweep(axes: Axes, variants: list[Variant]) -> None:
    for variant in variants:
        colour, marker = COLOURS[variant.residual], _MARKERS[variant.residual]
        rates = list(variant.by_rate)
        means = [fmean(losses) for losses in variant.by_rate.values()]
        axes.plot(rates, means, color=colour, linewidth=1.6)
        for rate, losses in variant.by_rate.items():
            axes.plot(
                [rate] * len(losses), losses, linestyle="none", marker=marker, markersize=6,
                color=colour, markerfacecolor=colour if rate == variant.best else "white",
            )  # fmt: skip
        axes.plot([], [], color=colour, marker=marker, linewidth=1.6, label=variant.residual)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{rate:g}" for rate in rates])
    axes.set_title("Validation loss; filled: the mode's best rate")
    axes.set_xlabel("peak learning rate, log scale")
    axes.set_ylabel("cross entropy, nats per token")
    axes.grid(axis="y", **GRID)
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, variants: list[Variant]) -> None:
    first, *others = variants
    for place, variant in enumerate(others):
        mine = variant.differences
        # Seeds side by side, so that equal ones do not hide each other.
        offsets = [place + 0.14 * (i - (len(mine) - 1) / 2) for i in range(len(mine))]
        axes.plot(
            offsets, mine, linestyle="none", marker=_MARKERS[variant.residual], markersize=7,
            color=COLOURS[variant.residual],
        )  # fmt: skip
        mean = fmean(mine)
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color="#333333", linewidth=1.2)
        axes.annotate(
            f"{mean:+.3f}", (place + 0.32, mean), va="center", fontsize=9, color="#333333"
        )
    axes.axhline(0, color=COLOURS[first.residual], linewidth=1.4, label=first.residual)
    axes.set_xticks(range(len(others)), [variant.residual for variant in others])
    axes.set_xlim(-0.6, len(others) - 0.2)
    axes.margins(y=0.15)
    axes.set_title(f"Minus {first.residual}, seed by seed")
    axes.set_ylabel("nats per token, below 0 is better")
    axes.grid(axis="y", **GRID)
    axes.legend(frameon=False, loc="best")


def main() -> int:
    """Draws the record named first into the file named second."""
    source, target = map(Path, sys.argv[1:3])
    plot(target, json.loads(source.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
