"""Where the stages of a pipeline begin, and which rank runs them.

A *stage* is a stretch of a model's sites with the sublayers that they feed; the last site is the
output's. Stages are cut between any two sublayers: blocks need not end where stages do.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "PLACEMENTS",
    "check_world_size",
    "first_sites_of",
    "place_stages",
    "split_evenly",
]

PLACEMENTS = ("loop", "v")


def split_evenly(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage: as even as can be, the first stages have one more.

    Raises:
        ValueError: If there are fewer layers than stages, or no stage.
    """
    if num_stages < 1:
        raise ValueError(f"split_evenly: num_stages is {num_stages}, expected at least 1")
    if num_layers < num_stages:
        raise ValueError(
            f"split_evenly: num_layers is {num_layers}, expected at least one for each of "
            f"{num_stages} stages"
        )
    least, more = divmod(num_layers, num_stages)
    return tuple(least + (stage < more) for stage in range(num_stages))


def first_sites_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """The first site of each stage, from how many sublayers each has.

    The first stage may have none: it then has the embedding alone.
    """
    return tuple(sum(sizes[:stage]) for stage in range(len(sizes)))


def place_stages(num_ranks: int, stages_per_rank: int, placement: str = "loop") -> tuple[int, ...]:
    """The rank of each stage.

    Args:
        num_ranks: Ranks of the pipeline, ``P``.
        stages_per_rank: Stages of each rank, ``V``.
        placement: ``"loop"`` begins again at rank 0 after the last rank (GPipe, 1F1B,
            Interleaved1F1B); ``"v"`` turns around there, and at rank 0 again (ZBV, DualPipeV).

    Raises:
        ValueError: If there is no rank or no stage, or for another placement.
    """
    for name, value in (("num_ranks", num_ranks), ("stages_per_rank", stages_per_rank)):
        if value < 1:
            raise ValueError(f"place_stages: {name} is {value}, expected at least 1")
    if placement not in PLACEMENTS:
        raise ValueError(
            f"place_stages: placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}"
        )
    there = tuple(range(num_ranks))
    ways = (there, there[::-1] if placement == "v" else there)
    return tuple(rank for turn in range(stages_per_rank) for rank in ways[turn % 2])


def check_world_size(world_size: int, num_ranks: int) -> int:
    """How many pipelines of ``num_ranks`` ranks a world of processes makes.

    Raises:
        ValueError: If that is no whole number.
    """
    if world_size < 1 or world_size % num_ranks:
        raise ValueError(
            f"world size is {world_size}, expected a multiple of the pipeline's {num_ranks} ranks"
        )
    return world_size // num_ranks
