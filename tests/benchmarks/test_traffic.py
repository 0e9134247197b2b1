"""Bytes that a case must move, against the numbers of the operators' table."""

from __future__ import annotations

import pytest

from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.traffic import bytes_moved, standard_bytes_moved


@pytest.mark.parametrize(
    ("operator", "sources", "queries", "gradients", "tensors"),
    [
        ("depth_attention", 9, 1, "none", 10),
        ("depth_attention", 9, 1, "graph", 10),
        ("depth_attention", 9, 1, "fresh", 29),
        ("depth_attention", 9, 1, "accumulate", 38),
        ("depth_attention", 1, 1, "none", 2),
        ("accumulate_depth_attention", 8, 1, "none", 12),
        ("accumulate_depth_attention", 8, 1, "fresh", 12 + 20),
        ("accumulate_depth_attention", 8, 1, "accumulate", 12 + 28),
        ("inter_block_attention", 9, 6, "none", 15),
        ("inter_block_attention", 9, 6, "fresh", 15 + 24),
        ("merge_partial", 9, 1, "none", 5),
        ("merge_partial", 2, 1, "fresh", 5 + 6),
    ],
)
@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_tensors_moved(
    operator: str,
    sources: int,
    queries: int,
    gradients: str,
    tensors: int,
    dtype: str,
    itemsize: int,
) -> None:
    case = Case(operator, sources, 100, 64, dtype, queries=queries, gradients=gradients)
    assert bytes_moved(case) == tensors * 100 * 64 * itemsize


def test_standard_residual() -> None:
    site = Case("merge_partial", 9, 100, 64, norm=True)
    assert standard_bytes_moved(site) == 4 * 100 * 64 * 2
    training = Case("merge_partial", 9, 100, 64, norm=True, gradients="fresh")
    assert standard_bytes_moved(training) == 8 * 100 * 64 * 2
