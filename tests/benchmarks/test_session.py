"""A run on its way: what is left of it, and how long that may take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from attnres_ext.benchmarks import results
from attnres_ext.benchmarks.session import Session, expected_seconds
from tests.benchmarks import made_up

CASES = dict.fromkeys("abcde", 10.0)


def row(case: str) -> results.Result:
    return results.Result(case, "op", "N2", "forward", "host", "ours", status="timed", seconds=1.0)


def begin(**facts: object) -> Session:
    return Session({**made_up.facts("2026-01-01"), "command": "attnres bench", **facts}, CASES)


def test_what_is_left_goes_at_the_pace_of_what_is_done() -> None:
    session = begin()
    assert session.seconds_left == 50
    for done, (case, left) in enumerate({"a": 40, "b": 30, "c": 40, "d": 20}.items(), start=1):
        # Twice as long as expected, which is believed from the third case on.
        session.add(case, [row(case)], 20.0)
        assert session.seconds_left == left
        assert len(session.finished) == done


def test_the_newest_run_on_the_device_says_how_long_a_case_takes(tmp_path: Path) -> None:
    for date, device, took in (
        ("2026-01-01", "cpu", {"a": 1.0, "b": 2.0}),
        ("2026-01-02", "cpu", {"a": 3.0, "other": 9.0}),
        ("2026-01-03", "cuda", {"a": 7.0}),
    ):
        made_up.keep(tmp_path, made_up.facts(date, device=device, case_seconds=took), [])
    (tmp_path / "damaged.jsonl").write_text("not json\n")
    guesses = {"a": 10.0, "b": 10.0, "c": 10.0}
    assert expected_seconds(tmp_path, "cpu", guesses) == {"a": 3.0, "b": 2.0, "c": 10.0}
    assert expected_seconds(None, "cpu", guesses) == guesses
    assert expected_seconds(tmp_path / "nowhere", "cpu", guesses) == guesses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"command": "attnres bench --cold"},
        {"commit": "c" * 40},
        {"csrc_sha256": made_up.OLD},
        {"machine": {"processor": "another", "cores": 2}},
        {"versions": {"torch": "2.14.0"}},
    ],
    ids=str,
)
def test_only_the_same_run_is_gone_on_with(tmp_path: Path, changes: dict[str, object]) -> None:
    first = begin()
    first.path = tmp_path / "first.jsonl"
    first.add("a", [row("a")], 1.0)
    second = begin(date="2026-02-01T00:00:00+00:00", **changes)
    assert second.resume(tmp_path) == (not changes)
    if not changes:
        assert (second.path, second.finished) == (first.path, {"a"})
        assert second.facts["resumed"] == ["2026-02-01T00:00:00+00:00"]
        second.add("b", [row("b")], 1.0)
        run, rows = results.read(first.path)
        assert run["date"] == first.facts["date"]
        assert [one.case for one in rows] == ["a", "b"]
        assert run["case_seconds"] == {"a": 1.0, "b": 1.0}


def test_us_alone_are_replaced_by_everybody(tmp_path: Path) -> None:
    """Whatever ends the run, it has us in the cases that others have not run in."""
    session = begin()
    session.path = tmp_path / "run.jsonl"
    for case in "ab":
        session.add(case, [row(case)], 1.0, whole=False)
    assert (session.begun, session.finished) == ({"a", "b"}, set())
    everybody = [row("a"), dataclasses.replace(row("a"), contestant="eager", seconds=9.0)]
    session.add("a", everybody, 1.0)
    assert session.finished == {"a"}
    again = begin(date="2026-02-01T00:00:00+00:00")
    assert again.resume(tmp_path)
    assert (again.begun, again.finished) == ({"a", "b"}, {"a"})
    assert sorted((one.case, one.contestant) for one in again.rows) == [
        ("a", "eager"), ("a", "ours"), ("b", "ours"),
    ]  # fmt: skip
