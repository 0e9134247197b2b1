"""What a case must move and compute.

The formulas of bytes are in ``csrc/include/attnres/plan.hpp``.
"""

from __future__ import annotations

import torch

from attnres_ext import _C

from .registry import Case


def bytes_moved(case: Case) -> int:
    """Bytes one timed call of ``case`` must move, in its forward and in its backward if any."""
    directions = ["forward"]
    if case.has_backward:
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
    return (2 + (4 if case.has_backward else 0)) * product


def arithmetic(case: Case) -> int:
    """Multiplications and additions of one timed call, as the definition has them.

    Of each value that is scored a square, a product with the query and a part of the mix, and in
    the backward a product with the gradient, three parts of the value's own gradient and one of the
    query's: two operations each. Softmax and what else happens once a row is left out, 1/D of it.
    """
    n, s = case.sources, case.queries
    if case.operator == "inter_block_attention":
        # Every query has a product and a mix; the squares and the value's own factor are shared.
        each = 4 * s * n + 2 * n
        if case.has_backward:
            each += 8 * s * n + 2 * n
    else:
        scored = {"depth_attention": n, "accumulate_depth_attention": n + 1, "merge_partial": 1}
        rows = scored[case.operator]
        # Phase 1's result is mixed, but not scored; a partial sum is made first.
        states = 1 if case.operator == "merge_partial" else 0
        sums = 0 if case.operator == "depth_attention" else 1
        mix = 2 * (rows + states)
        each = 4 * rows + mix + sums + (4 if case.norm else 0)
        if case.has_backward:
            # Behind a norm the mix is made again, and has a gradient of its own.
            each += 10 * rows + 4 * states + sums + (mix + 8 if case.norm else 0)
    if case.gradients == "accumulate":
        each += n
    return each * case.tokens * case.hidden


def standard_bytes_moved(case: Case) -> int:
    """Bytes of a standard residual's site: stream and delta in, stream and its norm out."""
    x = case.tokens * case.hidden * getattr(torch, case.dtype).itemsize
    # Backward: read two incoming gradients and the stream, write the one gradient that both inputs
    # share.
    return (4 + (4 if case.has_backward else 0)) * x
