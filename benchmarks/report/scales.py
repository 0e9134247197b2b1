"""Where a value lies on an axis, in percent of its length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``; logarithmic ones need both above zero."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The position of ``value``, kept on the axis."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(100 * min(max(share, 0.0), 1.0), 3)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that enclose ``low`` to ``high``, about ``count`` of them."""
    span = high - low or abs(high) or 1.0
    raw = span / max(count - 1, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= 0.999 * raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... within ``low`` and ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def scale_of(values: Sequence[float]) -> Scale:
    """A scale over ``values``: logarithmic where they grow by factors."""
    low, high = min(values), max(values)
    return Scale(low, high, logarithmic=low > 0 and high >= 4 * low)
