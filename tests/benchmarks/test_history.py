"""What counts as slower: 10 %, beyond the spread, and not because the machine slowed down."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_ext.benchmarks.report import history, kept
from attnres_ext.benchmarks.report.history import FASTER, SLOWER, STEADY
from tests.benchmarks import made_up
from tests.benchmarks.made_up import MIX, facts, model, timed


def point(seconds: float, spread: float = 0.04, yardstick: float | None = None) -> history.Point:
    run = kept.Run("run.jsonl", facts("2026-01-01"), ())
    low, high = (1 - spread / 2) * seconds, (1 + spread / 2) * seconds
    return history.Point(run, seconds, low, high, yardstick)


@pytest.mark.parametrize(
    ("points", "verdicts"),
    [
        ([point(1.0)], [STEADY]),
        ([point(1.0), point(1.09)], [STEADY, STEADY]),
        ([point(1.0), point(1.11)], [STEADY, SLOWER]),
        # A third slower, but the boxes overlap.
        ([point(1.0, spread=0.8), point(1.3, spread=0.2)], [STEADY, STEADY]),
        # Slower in small steps: against the best, not against the last.
        ([point(1.0), point(1.06), point(1.12)], [STEADY, STEADY, SLOWER]),
        # Faster, and back again.
        ([point(1.0), point(0.8), point(1.0)], [STEADY, FASTER, SLOWER]),
        ([point(1.0), point(0.95)], [STEADY, STEADY]),
        # Everything became slower, the copy too: the machine.
        ([point(1.0, yardstick=1.0), point(1.5, yardstick=1.45)], [STEADY, STEADY]),
        ([point(1.0, yardstick=1.0), point(1.5, yardstick=1.2)], [STEADY, SLOWER]),
        # A faster machine does not make code slower that takes as long as before.
        ([point(1.0, yardstick=1.0), point(1.0, yardstick=0.5)], [STEADY, STEADY]),
        ([point(1.0, yardstick=None), point(1.5, yardstick=1.5)], [STEADY, SLOWER]),
    ],
)
def test_verdicts(points: list[history.Point], verdicts: list[str]) -> None:
    assert list(history.judge(points)[0]) == verdicts


def test_changes_are_against_the_best_before() -> None:
    _, changes = history.judge([point(1.0), point(0.5), point(0.75)])
    assert changes[0] is None
    assert changes[1:] == (pytest.approx(-0.5), pytest.approx(0.5))


def run_of(date: str, *rows: object, **others: object) -> kept.Run:
    return kept.Run(f"{date}.jsonl", facts(date, **others), rows)


def series_of(*runs: kept.Run) -> list[history.Series]:
    everything = kept.Kept(Path(), runs)
    return [one for place in everything.places for one in history.series(everything, place)]


def test_only_equal_places_are_compared() -> None:
    first = run_of("2026-01-01", timed(MIX, "ours", 1.0))
    for others in ({"threads": 1}, {"cache": "cold"}, {"machine": {"processor": "B"}}):
        assert series_of(first, run_of("2026-02-01", timed(MIX, "ours", 9.0), **others)) == []
    (one,) = series_of(first, run_of("2026-02-01", timed(MIX, "ours", 9.0)))
    assert (one.verdict, one.case) == (SLOWER, MIX.name)


def test_the_copy_is_the_yardstick_and_plain_pytorch_where_nothing_is_copied() -> None:
    rows = [timed(MIX, "ours", 1.0), timed(MIX, "eager", 5.0)]
    slow = [timed(MIX, "ours", 2.0), timed(MIX, "eager", 10.0)]
    (one,) = series_of(run_of("2026-01-01", *rows), run_of("2026-02-01", *slow))
    assert one.verdict == STEADY
    copies = [timed(MIX, "copy", 1.0)]
    (one,) = series_of(run_of("2026-01-01", *rows, *copies), run_of("2026-02-01", *slow, *copies))
    assert one.verdict == SLOWER


def test_models_are_held_against_the_standard_residual() -> None:
    def rows(block: float, standard: float) -> list[object]:
        return [model(4, "standard", "standard", standard), model(4, "block", "ours", block)]

    (one,) = series_of(run_of("2026-01-01", *rows(1.1, 1.0)), run_of("2026-02-01", *rows(2.2, 2.0)))
    assert (one.case, one.verdict) == ("train/L4-D256/block", STEADY)
    (one,) = series_of(run_of("2026-01-01", *rows(1.1, 1.0)), run_of("2026-02-01", *rows(1.4, 1.0)))
    assert one.verdict == SLOWER


def test_runs_without_our_figure_are_no_points() -> None:
    missing = made_up.refused(MIX, "ours", "failed", "broken")
    assert (
        series_of(run_of("2026-01-01", missing), run_of("2026-02-01", timed(MIX, "ours", 1))) == []
    )


def test_how_much_of_a_change_is_the_machine() -> None:
    def drift(*points: history.Point) -> float | None:
        return history.Series("a", "a", points, *history.judge(points)).drift

    best = point(1.0, yardstick=1.0)
    assert drift(point(3.0, yardstick=9.0), best, point(1.5, yardstick=1.45)) == pytest.approx(0.45)
    assert drift(point(1.0), point(1.5, yardstick=1.45)) is None
