"""Timing that is fair to everybody: warm-up, contestants in turns, medians with their spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None


#: Seconds beyond which the caches cannot matter: memory could be read many times over.
_SLOW = 0.1


@dataclass
class Action:
    """Something to time.

    Attributes:
        run: the call; its argument counts calls, so that inputs can be rotated.
        before: what must happen before each call without being timed.
        context: what calls run in; entering and leaving it is not timed.
    """

    run: Callable[[int], object]
    before: Callable[[int], object] | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Timing:
    """Seconds per call, and how undisturbed the measurement was.

    Attributes:
        samples: seconds per call; several calls go into a sample when one is too short to time.
        preemptions: how often the system took a core away from this process meanwhile.
    """

    samples: list[float] = field(default_factory=list)
    preemptions: int = 0

    @property
    def median(self) -> float:
        """The figure to report."""
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """The fastest sample."""
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a share of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: turns that every contestant gets.
        turn: samples in a turn, after one call that is not timed: it brings back to the caches what
            the previous contestant threw out. Calls longer than `_SLOW` come without it.
        shortest: seconds that a sample lasts at least.
        budget: seconds after which a slow contestant gets fewer turns, and one sample a turn.
    """

    rounds: int = 7
    turn: int = 3
    shortest: float = 2e-4
    budget: float = 6.0


def measure(actions: Mapping[str, Action], effort: Effort) -> dict[str, Timing]:
    """Times ``actions`` in turns, so that a machine that slows down slows all of them down."""
    calls = dict.fromkeys(actions, 0)

    def sample(name: str, repeats: int) -> float:
        first = calls[name]
        calls[name] += repeats
        with actions[name].context():
            return _seconds(actions[name], range(first, first + repeats)) / repeats

    timings = {name: Timing() for name in actions}
    turns: dict[str, tuple[int, int, int, bool]] = {}
    for name in actions:
        # The gate has run everything once, so this call is a fair estimate.
        once = sample(name, 1)
        if once < effort.shortest:
            once = sample(name, 10)
        repeats = max(1, math.ceil(effort.shortest / max(once, 1e-9)))
        turn, warm = effort.turn, once < _SLOW
        if effort.rounds * (turn + warm) * repeats * once > effort.budget:
            turn = 1
        affordable = int(effort.budget / ((turn + warm) * repeats * once))
        turns[name] = (max(2, min(effort.rounds, affordable)), turn, repeats, warm)

    names = list(actions)
    for round_ in range(effort.rounds):
        # Nobody always runs after the same predecessor.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            rounds, turn, repeats, warm = turns[name]
            # Slow ones sit out, evenly: they run in `rounds` of all rounds.
            if (round_ + 1) * rounds // effort.rounds == round_ * rounds // effort.rounds:
                continue
            if warm:
                sample(name, 1)
            before = _preemptions()
            timings[name].samples += [sample(name, repeats) for _ in range(turn)]
            timings[name].preemptions += _preemptions() - before
    return timings


def _seconds(action: Action, calls: range) -> float:
    run, before = action.run, action.before
    if before is None:
        start = time.perf_counter()
        for call in calls:
            run(call)
        return time.perf_counter() - start
    seconds = 0.0
    for call in calls:
        before(call)
        start = time.perf_counter()
        run(call)
        seconds += time.perf_counter() - start
    return seconds


def _preemptions() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
