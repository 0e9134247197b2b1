"""Bytes that a case must move; the formulas themselves are in ``csrc/include/attnres/plan.hpp``."""

from __future__ import annotations

import torch

from attnres_ext import _C
from attnres_ext.benchmarks.registry import Case


def bytes_moved(case: Case) -> int:
    """Bytes one timed call of ``case`` must move, in its forward and in its backward if any."""
    directions = ["forward"]
    if case.gradients in ("fresh", "accumulate"):
        directions.append("backward")
    itemsize = getattr(torch, case.dtype).itemsize
    return sum(
        _C.bytes_moved(
            case.operator,
            direction,
            num_sources=case.sources,
            num_queries=case.queries,
            num_tokens=case.tokens,
            hidden=case.hidden,
            itemsize=itemsize,
            accumulate=direction == "backward" and case.gradients == "accumulate",
        )
        for direction in directions
    )


def operations(case: Case) -> int | None:
    """Multiplications and additions on matrices of one timed call; None for what has no matrices.

    Phase 1 multiplies ``[S, D]`` queries with ``[D, N]`` sources for each token, and ``[S, N]``
    weights with ``[N, D]`` sources; its backward makes four such products.
    """
    if case.operator != "inter_block_attention":
        return None
    product = 2 * case.queries * case.sources * case.hidden * case.tokens
    return (2 + (4 if case.gradients in ("fresh", "accumulate") else 0)) * product


def standard_bytes_moved(case: Case) -> int:
    """Bytes of a standard residual's site: stream and delta in, stream and its norm out."""
    x = case.tokens * case.hidden * getattr(torch, case.dtype).itemsize
    # Backward: read two incoming gradients and the stream, write the one gradient that both inputs
    # share.
    return (4 + (4 if case.gradients in ("fresh", "accumulate") else 0)) * x
