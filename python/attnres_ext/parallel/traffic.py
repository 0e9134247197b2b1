"""What a plan's hops and caches amount to, in tensors and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnres_ext.parallel.routing import Hop, PipelinePlan

__all__ = ["Traffic", "count_traffic", "peak_blocks", "tensor_bytes"]


@dataclass(frozen=True)
class Traffic:
    """Tensors ``[tokens, D]`` that hops between ranks send for one microbatch.

    Attributes:
        forward: Sums, and the blocks that receivers lack.
        backward: Their gradients, and with chained gradients those of other blocks.
        naive: One way without a cache: the sums and every block.
        padded: One way with the cache, if each hop sent as many tensors as the widest.
        widest: Tensors of the widest hop, forward.
        widest_backward: Of the widest hop, backward.
        widest_naive: Of the widest hop without a cache.
    """

    forward: int
    backward: int
    naive: int
    padded: int
    widest: int
    widest_backward: int
    widest_naive: int


def count_traffic(plan: PipelinePlan) -> Traffic:
    """Counts what crosses from rank to rank."""

    def sizes(name: str) -> list[int]:
        return [1 + len(getattr(hop, name)) for hop in _crossing(plan)]

    forward, backward, naive = sizes("blocks"), sizes("gradients"), sizes("closed")
    widest = max(forward, default=0)
    return Traffic(
        forward=sum(forward),
        backward=sum(backward),
        naive=sum(naive),
        padded=widest * len(forward),
        widest=widest,
        widest_backward=max(backward, default=0),
        widest_naive=max(naive, default=0),
    )


def _crossing(plan: PipelinePlan) -> list[Hop]:
    return [hop for hop in plan.hops if hop.crosses]


def tensor_bytes(num_tokens: int, hidden_size: int, itemsize: int) -> int:
    """Bytes of a sum, or of a block, of one microbatch."""
    return num_tokens * hidden_size * itemsize


def peak_blocks(plan: PipelinePlan, rank: int, order: Iterable[tuple[str, int, int]]) -> int:
    """The most blocks that a rank holds at a time.

    Args:
        plan: The routes.
        rank: Whose.
        order: What the rank does, in turn: ``("F", stage, microbatch)`` for a forward, ``("B",
            stage, microbatch)`` for a backward (of the inputs, where a schedule splits it).

    Raises:
        ValueError: For a stage of another rank, or another kind of action.
    """
    arriving: dict[int, int] = {stage.index: 0 for stage in plan.stages_of(rank)}
    leaving = dict(arriving)
    for kept in plan.kept_by(rank):
        arriving[kept.stage] += 1
        leaving[kept.last_backward] += 1
    held = peak = 0
    for action, stage, _ in order:
        if stage not in arriving:
            raise ValueError(f"peak_blocks: stage {stage} is not one of rank {rank}")
        if action not in ("F", "B"):
            raise ValueError(f"peak_blocks: action is {action!r}, expected 'F' or 'B'")
        held += arriving[stage] if action == "F" else -leaving[stage]
        peak = max(peak, held)
    return peak
