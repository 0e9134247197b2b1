"""What evidence runs came to: each mode at its own best learning rate, differences within seeds.

Needs nothing that is compiled, so that tables can be rendered anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; the latter is None with one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value per seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        deviation = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{deviation}"


@dataclass(frozen=True)
class Arm:
    """One residual mode.

    Attributes:
        residual: The mode.
        by_rate: Learning rate -> its validation losses over seeds.
        best: The learning rate with the lowest mean.
        at_edge: Whether that is the smallest or largest tried: a better one may lie beyond.
        difference: Validation loss minus that of the first mode, each at its own best rate, seed by
            seed; None for the first mode.
    """

    residual: str
    by_rate: dict[float, Spread]
    best: float
    at_edge: bool
    difference: Spread | None


def complete_seeds(record: dict[str, Any]) -> list[int]:
    """Seeds of which every mode has been trained at every learning rate."""
    design = record["design"]
    wanted = len(design["residuals"]) * len(design["learning_rates"])
    found = [loss["seed"] for loss in record["losses"]]
    return [seed for seed in design["seeds"] if found.count(seed) == wanted]


def summarize(record: dict[str, Any]) -> list[Arm]:
    """One row per mode, over the seeds that are complete; none without such a seed.

    Args:
        record: What ``benchmarks/evidence.py`` keeps.
    """
    seeds = complete_seeds(record)
    if not seeds:
        return []
    losses = {
        (loss["residual"], loss["learning_rate"], loss["seed"]): loss["val_loss"]
        for loss in record["losses"]
    }
    rates = sorted(record["design"]["learning_rates"])
    arms: list[Arm] = []
    for residual in record["design"]["residuals"]:
        by_rate = {
            rate: Spread.of([losses[residual, rate, seed] for seed in seeds]) for rate in rates
        }
        best = min(rates, key=lambda rate: by_rate[rate].mean)
        difference = None
        if arms:
            first = arms[0]
            difference = Spread.of(
                [losses[residual, best, s] - losses[first.residual, first.best, s] for s in seeds]
            )
        arms.append(Arm(residual, by_rate, best, best in (rates[0], rates[-1]), difference))
    return arms
