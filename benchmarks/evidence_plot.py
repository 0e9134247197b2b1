"""Draws what evidence runs came to.

    python -m attnres_ext.benchmarks.evidence_plot benchmarks/results/evidence-deep-narrow.json \\
        docs/images/evidence-deep-narrow.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from attnres_ext.training.plot_style import COLOURS, GRID, STYLE, head, save

from .evidence_summary import Arm, complete_seeds, summarize

_MARKERS = {"standard": "s", "block": "o", "full": "^"}


def plot(path: Path, record: dict[str, Any]) -> None:
    """Left: losses over learning rates, a mark per seed. Right: differences, seed by seed.

    Args:
        path: PNG to write.
        record: What ``benchmarks/evidence.py`` keeps, with at least one complete seed.
    """
    arms, design = summarize(record), record["design"]
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
        _draw_sweep(left, record, arms)
        _draw_differences(right, record, arms)
        save(figure, path)


def _losses(record: dict[str, Any], residual: str, rate: float) -> list[float]:
    seeds = complete_seeds(record)
    mine = {
        loss["seed"]: loss["val_loss"]
        for loss in record["losses"]
        if (loss["residual"], loss["learning_rate"]) == (residual, rate)
    }
    return [mine[seed] for seed in seeds]


def _draw_sweep(axes: Axes, record: dict[str, Any], arms: list[Arm]) -> None:
    for arm in arms:
        colour, marker = COLOURS[arm.residual], _MARKERS[arm.residual]
        rates = list(arm.by_rate)
        means = [arm.by_rate[rate].mean for rate in rates]
        axes.plot(rates, means, color=colour, linewidth=1.6)
        for rate in rates:
            losses = _losses(record, arm.residual, rate)
            axes.plot(
                [rate] * len(losses), losses, linestyle="none", marker=marker, markersize=6,
                color=colour, markerfacecolor=colour if rate == arm.best else "white",
            )  # fmt: skip
        axes.plot([], [], color=colour, marker=marker, linewidth=1.6, label=arm.residual)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(arms[0].by_rate)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{rate:g}" for rate in arms[0].by_rate])
    axes.set_title("Validation loss; filled: the mode's best rate")
    axes.set_xlabel("peak learning rate, log scale")
    axes.set_ylabel("cross entropy, nats per token")
    axes.grid(axis="y", **GRID)
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, record: dict[str, Any], arms: list[Arm]) -> None:
    first, *others = arms
    base = _losses(record, first.residual, first.best)
    seeds = complete_seeds(record)
    for place, arm in enumerate(others):
        mine = _losses(record, arm.residual, arm.best)
        differences = [one - other for one, other in zip(mine, base, strict=True)]
        # Seeds side by side, so that equal ones do not hide each other.
        offsets = [place + 0.14 * (i - (len(seeds) - 1) / 2) for i in range(len(seeds))]
        axes.plot(
            offsets, differences, linestyle="none", marker=_MARKERS[arm.residual], markersize=7,
            color=COLOURS[arm.residual],
        )  # fmt: skip
        mean = sum(differences) / len(differences)
        axes.plot([place - 0.3, place + 0.3], [mean, mean], color="#333333", linewidth=1.2)
        axes.annotate(
            f"{mean:+.3f}", (place + 0.32, mean), va="center", fontsize=9, color="#333333"
        )
    axes.axhline(0, color=COLOURS[first.residual], linewidth=1.4, label=first.residual)
    axes.set_xticks(range(len(others)), [arm.residual for arm in others])
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
