"""Timing that is fair to everybody: warm-up, baselines in turns, medians with their spread.

How a sample is taken is a timer's business: :class:`HostTimer` here, graphs and events in
:mod:`attnres_ext.benchmarks.cuda_timing`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

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
        period: after how many calls their inputs come again.
    """

    run: Callable[[int], object]
    before: Callable[[int], object] | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    period: int = 1


class Sampler(Protocol):
    """Takes samples of one action."""

    #: As in :attr:`attnres_ext.benchmarks.results.Measurement.timer`.
    timer: str

    def sample(self, repeats: int) -> float:
        """Seconds per call over about ``repeats`` calls, one after the other."""


class Timer(Protocol):
    """A way to take samples."""

    def load(self, action: Action, shortest: float) -> Sampler:
        """Prepares to time ``action`` in samples of at least ``shortest`` seconds."""


@dataclass
class Timing:
    """Seconds per call, and how undisturbed the measurement was.

    Attributes:
        samples: seconds per call; several calls go into a sample when one is too short to time.
        preemptions: how often the system took a core away from this process meanwhile.
        timer: how samples were taken.
    """

    samples: list[float] = field(default_factory=list)
    preemptions: int = 0
    timer: str = "clock"

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

    def figures(self) -> dict[str, Any]:
        """What results keep of it (:class:`attnres_ext.benchmarks.results.Measurement`)."""
        return {
            "seconds": self.median,
            "best_seconds": self.best,
            "spread": self.spread,
            "samples": tuple(self.samples),
            "preemptions": self.preemptions,
            "timer": self.timer,
        }


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: turns that everybody gets.
        turn: samples in a turn, after one call that is not timed: it brings back to the caches what
            the one before threw out. Calls longer than `_SLOW` come without it.
        shortest: seconds that a sample lasts at least.
        budget: seconds after which a slow one gets fewer turns, and one sample a turn.
    """

    rounds: int = 7
    turn: int = 3
    shortest: float = 2e-4
    budget: float = 6.0


@dataclass(frozen=True)
class InStep:
    """Of long actions, whose n-th samples must be of the same turn, so that they can be divided.

    Attributes:
        budget: seconds for everybody together; it decides on the number of turns, from 5 to 25.
        turns: how many, if not as many as there is time for.
    """

    budget: float
    turns: int | None = None


class Turns(NamedTuple):
    """What somebody gets: in how many rounds, samples in each, calls a sample, and whether a call
    comes before them."""

    rounds: int
    samples: int
    repeats: int
    warm: bool


class HostTimer:
    """The host's clock.

    Args:
        wait: called before the clock is read; for a device that works on its own, its barrier.
    """

    def __init__(self, wait: Callable[[], object] | None = None):
        self._wait = wait

    def load(self, action: Action, shortest: float) -> Sampler:
        """Nothing is prepared: a sample calls the action."""
        return _HostSampler(action, self._wait)


class _HostSampler:
    timer = "clock"

    def __init__(self, action: Action, wait: Callable[[], object] | None):
        self._action = action
        self._wait = wait
        self._calls = 0

    def sample(self, repeats: int) -> float:
        calls = range(self._calls, self._calls + repeats)
        self._calls += repeats
        with self._action.context():
            return self._seconds(calls) / repeats

    def _seconds(self, calls: range) -> float:
        run, before = self._action.run, self._action.before
        if before is None:
            start = self._now()
            for call in calls:
                run(call)
            return self._now() - start
        seconds = 0.0
        for call in calls:
            before(call)
            start = self._now()
            run(call)
            seconds += self._now() - start
        return seconds

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.perf_counter()


def measure(
    actions: Mapping[str, Action],
    effort: Effort | InStep,
    timer: Timer | None = None,
    refuse: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Times ``actions`` in turns, so that a machine that slows down slows all of them down.

    Args:
        actions: what to time, by name.
        effort: how long.
        timer: how to take a sample; the host's clock by default.
        refuse: told of an action that cannot be loaded (its memory may not suffice for one more),
            which is then left out; without it such an error is raised.
    """
    timer = timer or HostTimer()
    shortest = effort.shortest if isinstance(effort, Effort) else 0.0
    samplers: dict[str, Sampler] = {}
    once: dict[str, float] = {}
    for name, action in actions.items():
        try:
            sampler = timer.load(action, shortest)
            # The gate has run everything once, so this call is a fair estimate.
            took = sampler.sample(1)
            if isinstance(effort, InStep):
                took = sampler.sample(1)  # whatever is done once is done
            elif took < shortest:
                took = sampler.sample(10)
            samplers[name], once[name] = sampler, took
        except Exception as error:  # whatever somebody throws, the others go on
            if refuse is None:
                raise
            refuse(name, error)
    if isinstance(effort, InStep):
        rounds = effort.turns or max(5, min(25, int(effort.budget / max(sum(once.values()), 1e-9))))
        plans = {name: Turns(rounds, 1, 1, False) for name in samplers}
    else:
        rounds = effort.rounds
        plans = {name: _turns(effort, took) for name, took in once.items()}
    timings = {name: Timing(timer=sampler.timer) for name, sampler in samplers.items()}
    names = list(samplers)
    for round_ in range(rounds if names else 0):
        # Nobody always runs after the same predecessor.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            plan, sampler, timing = plans[name], samplers[name], timings[name]
            # Slow ones sit out, evenly: they run in `plan.rounds` of all rounds.
            if (round_ + 1) * plan.rounds // rounds == round_ * plan.rounds // rounds:
                continue
            if plan.warm:
                sampler.sample(1)
            before = _preemptions()
            timing.samples += [sampler.sample(plan.repeats) for _ in range(plan.samples)]
            timing.preemptions += _preemptions() - before
    return timings


def _turns(effort: Effort, once: float) -> Turns:
    """What somebody gets whose call takes ``once`` seconds."""
    repeats = max(1, math.ceil(effort.shortest / max(once, 1e-9)))
    samples, warm = effort.turn, once < _SLOW
    if effort.rounds * (samples + warm) * repeats * once > effort.budget:
        samples = 1
    affordable = int(effort.budget / ((samples + warm) * repeats * once))
    return Turns(max(2, min(effort.rounds, affordable)), samples, repeats, warm)


def _preemptions() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
