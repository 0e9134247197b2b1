"""Timing with a clock that the test winds: turns, medians, and what is left out of a figure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attnres_ext.benchmarks import timing
from attnres_ext.benchmarks.timing import Action, Effort, InStep, Timing, measure


class Clock:
    """Time passes only when a contestant works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def work(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.log.append(name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


def test_reports_the_time_of_one_call(clock: Clock) -> None:
    actions = {
        "long": Action(lambda _: clock.work("long", 2e-2)),
        "short": Action(lambda _: clock.work("short", 1e-6)),
    }
    timings = measure(actions, Effort(rounds=3, turn=2))
    assert timings["long"].median == pytest.approx(2e-2)
    assert timings["short"].median == pytest.approx(1e-6)
    assert len(timings["long"].samples) == len(timings["short"].samples) == 6
    # A microsecond cannot be timed by itself: many calls went into one sample.
    assert clock.log.count("short") > 100


def test_everybody_takes_turns(clock: Clock) -> None:
    actions = {n: Action(lambda _, n=n: clock.work(n, 1e-2)) for n in "abc"}
    measure(actions, Effort(rounds=4, turn=1))
    # One call each to learn how long it takes; then a warm and a timed call in every turn.
    turns = "".join(clock.log[3:])
    assert turns == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


def test_drift_hits_all_alike(clock: Clock) -> None:
    actions = {
        n: Action(lambda _, n=n: clock.work(n, 1e-2 * (1 + clock.now))) for n in ("one", "other")
    }
    timings = measure(actions, Effort(rounds=9, turn=3))
    assert timings["one"].median == pytest.approx(timings["other"].median, rel=0.1)


def test_slow_ones_get_fewer_turns_but_at_least_two(clock: Clock) -> None:
    actions = {
        "slow": Action(lambda _: clock.work("slow", 5.0)),
        "fast": Action(lambda _: clock.work("fast", 1e-3)),
    }
    timings = measure(actions, Effort(rounds=8, turn=3, budget=1.0))
    assert len(timings["slow"].samples) == 2
    assert len(timings["fast"].samples) == 24


def test_what_comes_before_a_call_is_not_timed(clock: Clock) -> None:
    action = Action(lambda _: clock.work("run", 1e-3), before=lambda _: clock.work("before", 1.0))
    timings = measure({"it": action}, Effort(rounds=2, turn=2))
    assert timings["it"].median == pytest.approx(1e-3)
    assert clock.log.count("before") == clock.log.count("run")


def test_the_context_is_not_timed(clock: Clock) -> None:
    inside: list[bool] = []

    @contextmanager
    def context() -> Iterator[None]:
        clock.work("enter", 1.0)
        inside.append(True)
        yield
        inside.pop()
        clock.work("leave", 1.0)

    def run(_: int) -> None:
        assert inside
        clock.work("run", 1e-3)

    timings = measure({"it": Action(run, context=context)}, Effort(rounds=2, turn=2))
    assert timings["it"].median == pytest.approx(1e-3)


def test_calls_are_counted_for_the_rotation_of_inputs(clock: Clock) -> None:
    seen: list[int] = []

    def run(call: int) -> None:
        seen.append(call)
        clock.work("it", 1e-3)

    measure({"it": Action(run)}, Effort(rounds=2, turn=2))
    assert seen == list(range(len(seen)))


def test_statistics() -> None:
    measured = Timing([1.0, 2.0, 3.0, 4.0, 100.0])
    assert measured.median == 3.0
    assert measured.best == 1.0
    assert measured.spread == pytest.approx(2 / 3)
    assert Timing([1.0]).spread == 0.0


def test_long_actions_are_timed_in_step_and_who_raises_is_left_out() -> None:
    order: list[str] = []

    def explode(_: int) -> None:
        raise MemoryError("too large")

    refused: dict[str, str] = {}
    actions = {name: Action(lambda _, name=name: order.append(name)) for name in "abc"}
    timings = measure(
        {"large": Action(explode), **actions},
        InStep(1.0, turns=3),
        refuse=lambda name, error: refused.update({name: str(error)}),
    )
    assert refused == {"large": "too large"}
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(timing.samples) for name, timing in timings.items()} == dict.fromkeys(
        "abc", 3
    )
    with pytest.raises(MemoryError):
        measure({"large": Action(explode)}, InStep(1.0))
