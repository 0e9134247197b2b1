"""What became faster or slower from one commit to the next.

A figure counts as slower only where three things hold together, because machines are noisy:

1. its median is at least 10 % above the best that the same case reached earlier in the same place;
2. the two do not overlap: the lower quartile now lies above the upper quartile then;
3. the machine itself is not what slowed down: still 10 % after dividing both by what the yardstick
   of the same case took in the same turns (a copy, or the standard residual for models, or plain
   PyTorch where nothing is copied).

The same the other way round, against the last run, is an improvement.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..results import ModelResult, Result
from .kept import Kept, Place, Run

#: What makes a regression, as a share.
THRESHOLD = 0.10

STEADY, FASTER, SLOWER = "steady", "faster", "slower"


@dataclass(frozen=True)
class Point:
    """One case in one run. Times are seconds.

    Attributes:
        run: where from.
        seconds: median.
        low: lower quartile of the samples.
        high: upper quartile.
        yardstick: what the yardstick took in the same run; None where there was none.
    """

    run: Run
    seconds: float
    low: float
    high: float
    yardstick: float | None

    def change(self, then: Point) -> float:
        """How much longer than ``then`` this took, as a share."""
        return self.seconds / then.seconds - 1

    def is_slower(self, then: Point) -> bool:
        """Whether this is a regression from ``then``."""
        if self.change(then) < THRESHOLD or self.low <= then.high:
            return False
        if self.yardstick is None or then.yardstick is None:
            return True
        drift = self.yardstick / then.yardstick
        return self.seconds / then.seconds / drift - 1 >= THRESHOLD


@dataclass(frozen=True)
class Series:
    """One case in one place over time.

    Attributes:
        case: its name.
        label: for people.
        points: oldest first.
        verdicts: one for each point: "steady", "faster" than the point before it, or "slower" than
            the best before it.
        changes: as shares, against the best point before each; None for the first.
    """

    case: str
    label: str
    points: tuple[Point, ...]
    verdicts: tuple[str, ...]
    changes: tuple[float | None, ...]

    @property
    def verdict(self) -> str:
        """Of the newest point."""
        return self.verdicts[-1]

    @property
    def drift(self) -> float | None:
        """How much longer the yardstick took than beside the best point before, as a share."""
        now = self.points[-1].yardstick
        then = min(self.points[:-1], key=lambda point: point.seconds).yardstick
        return None if now is None or then is None else now / then - 1


def judge(points: Sequence[Point]) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """A verdict for each of ``points``, and its change against the best one before it."""
    verdicts, changes = [STEADY], [None]
    for index in range(1, len(points)):
        now, last = points[index], points[index - 1]
        best = min(points[:index], key=lambda point: point.seconds)
        changes.append(now.change(best))
        if now.is_slower(best):
            verdicts.append(SLOWER)
        else:
            verdicts.append(FASTER if last.is_slower(now) else STEADY)
    return tuple(verdicts), tuple(changes)


def series(kept: Kept, place: Place) -> list[Series]:
    """Our figures of every case that ran more than once in ``place``."""
    found: dict[str, tuple[str, list[Point]]] = {}
    for run in kept.at(place):
        for name, label, row, yardstick in _figures(run):
            point = Point(run, row.seconds, *_quartiles(row), yardstick)
            found.setdefault(name, (label, []))[1].append(point)
    return [
        Series(name, label, tuple(points), *judge(points))
        for name, (label, points) in found.items()
        if len(points) > 1
    ]


def _figures(run: Run) -> Iterator[tuple[str, str, Result | ModelResult, float | None]]:
    for name, rows in run.by_case.items():
        ours = rows.get("ours")
        if ours is not None and ours.seconds:
            label = f"{ours.operator} · {ours.shape} · {ours.work}"
            yield name, label, ours, _first(rows.get("copy"), rows.get("eager"))
    for name, models in run.models_by_case.items():
        for (residual, who), ours in models.items():
            if who == "ours" and ours.seconds:
                label = f"{ours.work} · {ours.shape} · {residual}"
                yield f"{name}/{residual}", label, ours, _first(models.get(("standard",) * 2))


def _first(*rows: Result | ModelResult | None) -> float | None:
    return next((row.seconds for row in rows if row is not None and row.seconds), None)


def _quartiles(row: Result | ModelResult) -> tuple[float, float]:
    if len(row.samples) > 1:
        low, _, high = statistics.quantiles(row.samples, n=4, method="inclusive")
        return low, high
    half = (row.spread or 0.0) * row.seconds / 2
    return row.seconds - half, row.seconds + half
