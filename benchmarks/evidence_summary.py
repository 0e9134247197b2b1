"""What evidence runs came to: each mode at its own best learning rate, differences within seeds.

Needs nothing that is compiled, so that tables can be rendered anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in words."""
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}"


@dataclass(frozen=True)
class Variant:
    """One residual mode.

    Attributes:
        residual: The mode.
        by_rate: Learning rate -> its validation losses, one for each seed.
        best: The learning rate with the lowest mean.
        differences: Validation losses minus those of the first mode, each at its own best rate,
            seed by seed; none for the first mode.
    """

    residual: str
    by_rate: dict[float, list[float]]
    best: float
    differences: list[float]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried: a better one may lie beyond."""
        return self.best in (min(self.by_rate), max(self.by_rate))


def complete_seeds(record: dict[str, Any]) -> list[int]:
    """Seeds of which every mode has been trained at every learning rate."""
    design = record["design"]
    wanted = len(design["residuals"]) * len(design["learning_rates"])
    found = [loss["seed"] for loss in record["losses"]]
    return [seed for seed in design["seeds"] if found.count(seed) == wanted]


def summarize(record: dict[str, Any]) -> list[Variant]:
    """Every mode, over the seeds that are complete; none without such a seed.

    Args:
        record: What ``benchmarks/evidence.py`` keeps.
    """
    seeds = complete_seeds(record)
    losses = {
        (loss["residual"], loss["learning_rate"], loss["seed"]): loss["val_loss"]
        for loss in record["losses"]
    }
    rates = sorted(record["design"]["learning_rates"])
    variants: list[Variant] = []
    for residual in record["design"]["residuals"] if seeds else ():
        by_rate = {rate: [losses[residual, rate, seed] for seed in seeds] for rate in rates}
        best = min(rates, key=lambda rate: fmean(by_rate[rate]))
        first = variants[0].by_rate[variants[0].best] if variants else []
        differences = [mine - other for mine, other in zip(by_rate[best], first, strict=False)]
        variants.append(Variant(residual, by_rate, best, differences))
    return variants
