"""Past one device: pipelines, and block representations sharded along the sequence.

What is here decides and counts; processes, groups and schedules are those of ``torch.distributed``.
"""

from attnres_ext.parallel.rank_blocks import RankBlocks
from attnres_ext.parallel.routing import PipelinePlan, StagePlan, plan_pipeline
from attnres_ext.parallel.sequence import SequenceParallel, SequenceState
from attnres_ext.parallel.shards import SequenceShards
from attnres_ext.parallel.split import check_world_size, first_sites_of, place_stages, split_evenly
from attnres_ext.parallel.stage_blocks import StageBlocks
from attnres_ext.parallel.traffic import Traffic, count_traffic, peak_blocks, tensor_bytes

__all__ = [
    "PipelinePlan",
    "RankBlocks",
    "SequenceParallel",
    "SequenceShards",
    "SequenceState",
    "StageBlocks",
    "StagePlan",
    "Traffic",
    "check_world_size",
    "count_traffic",
    "first_sites_of",
    "peak_blocks",
    "place_stages",
    "plan_pipeline",
    "split_evenly",
    "support_dtensor",
    "tensor_bytes",
]


def support_dtensor() -> None:
    """Lets the operators, and modules that use them, take ``DTensor``: sharded tokens, replicated
    queries and gains (see :mod:`attnres_ext.parallel.dtensor`). Call it once."""
    # Who has no DTensor need not wait until torch has loaded them.
    from attnres_ext.parallel import dtensor

    dtensor.register()
