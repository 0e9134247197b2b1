"""Rooflines: what is computed, and that a dot lies where its rate and its roofs say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnres_ext.benchmarks import traffic
from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.report import kept
from attnres_ext.benchmarks.report.sections import roofline
from tests.benchmarks import made_up

VALUES = 2048 * 2304
INTER = Case("inter_block_attention", 9, 2048, 2304, queries=6)


@pytest.mark.parametrize(
    ("case", "operations"),
    [
        (Case("depth_attention", 9, 2048, 2304), 9 * 6),
        (Case("depth_attention", 9, 2048, 2304, norm=True), 9 * 6 + 4),
        (Case("depth_attention", 9, 2048, 2304, gradients="graph"), 9 * 6),
        (Case("depth_attention", 9, 2048, 2304, gradients="fresh"), 9 * 16),
        (Case("depth_attention", 9, 2048, 2304, gradients="accumulate"), 9 * 17),
        (Case("accumulate_depth_attention", 8, 2048, 2304), 9 * 6 + 1),
        (Case("merge_partial", 9, 2048, 2304), 9),
        (INTER, 4 * 54 + 18),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_operations_of_the_definition(case: Case, operations: int) -> None:
    assert traffic.arithmetic(case) == operations * VALUES


@pytest.mark.parametrize("gradients", ["none", "fresh"])
def test_matrix_products_are_most_of_phase_1(gradients: str) -> None:
    case = replace(INTER, gradients=gradients)
    rest = traffic.arithmetic(case) - traffic.operations(case)
    assert rest == (18 if gradients == "none" else 36) * VALUES


def drawn(rows: tuple[Any, ...], **facts: Any) -> str | None:
    run = kept.Run("a.jsonl", made_up.facts("2026-01-01", **facts), rows, ())
    return roofline.drawn(kept.Kept(Path(), (run,)), run.place)


def numbers(source: str, element: str, kind: str) -> list[tuple[float, ...]]:
    """Coordinates of elements of a class, in percent and pixels."""
    found = []
    for attributes in re.findall(f"<{element} ([^>]*)>", source):
        values = dict(re.findall(r'(\w+)="([^"]*)"', attributes))
        if values.pop("class") == kind:
            names = ("cx", "cy") if element == "circle" else ("x1", "y1", "x2", "y2")
            found.append(tuple(float(values[name].rstrip("%")) for name in names))
    return found


def test_a_dot_at_the_copy_s_bandwidth_lies_on_the_roof() -> None:
    moved = traffic.bytes_moved(made_up.MIX)
    rows = (
        made_up.timed(made_up.MIX, "ours", moved / 20e9, bytes=moved),
        made_up.timed(made_up.MIX, "eager", moved / 5e9, bytes=moved),
    )
    copies = {"1": 50.0, "256": 20.0}
    source = drawn(rows, copy_gbps_by_mib=copies, matrix_tflops={"float32": 0.2})
    (slope, peak) = numbers(source, "line", "roof")
    (cached,) = numbers(source, "line", "roof thin")
    x1, y1, x2, y2 = slope
    ((x, y),) = numbers(source, "circle", "s-ours")
    assert y == pytest.approx(y1 + (y2 - y1) * (x - x1) / (x2 - x1), abs=0.1)
    # The same work, in four times the time: straight below.
    ((below_x, below_y),) = numbers(source, "circle", "s-eager")
    assert below_x == x
    assert below_y > y
    # Both slopes end under the same ceiling, the faster one further left.
    assert peak[1] == peak[3] == y2 == cached[3]
    assert cached[2] < x2
    assert peak[0] == cached[2]
    assert "20 GB/s" in source
    assert "50 GB/s" in source


def test_a_backward_is_hollow() -> None:
    case = replace(made_up.MIX, gradients="fresh")
    rows = (made_up.timed(case, "ours", 5e-3),)
    source = drawn(rows, copy_gbps_by_mib={"64": 20.0}, matrix_tflops={"float32": 0.2})
    assert len(numbers(source, "circle", "s-ours hollow")) == 1
    assert numbers(source, "circle", "s-ours") == []


@pytest.mark.parametrize("missing", ["copies", "products", "case", "time"])
def test_nothing_is_drawn_without_roofs_or_dots(missing: str) -> None:
    row = made_up.timed(made_up.MIX, "ours", 5e-3)
    facts: dict[str, Any] = {
        "copy_gbps_by_mib": {"64": 20.0},
        "matrix_tflops": {"float32": 0.2},
    }
    if missing == "copies":
        del facts["copy_gbps_by_mib"]
    elif missing == "products":
        facts["matrix_tflops"] = {}
    elif missing == "case":
        row = replace(row, case="an_operator/of-other-times")
    else:
        row = replace(row, seconds=None, status="failed")
    assert drawn((row,), **facts) is None
