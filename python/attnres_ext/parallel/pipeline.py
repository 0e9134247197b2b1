"""Stages for ``torch.distributed.pipelining`` whose ranks keep blocks for their later stages.

Cross-stage caching (paper, section 3.2): a hop brings what its receiver lacks, one tensor a block,
and the sum that is open. Schedules, sends and the backward are torch's own; a stage adds to each
forward the blocks that its rank has, and to each backward their gradients. Which these are says a
:class:`PipelinePlan`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from attnres_ext.parallel.rank_blocks import RankBlocks
from attnres_ext.parallel.routing import PipelinePlan, StagePlan
from attnres_ext.parallel.stage_blocks import StageBlocks
from attnres_ext.torch_internals import pipeline_stage

__all__ = ["AttentionResidualsStage", "pipeline_stages"]

_PipelineStage, _receive_buffer = pipeline_stage()

# The microbatch that torch sends ahead to learn shapes.
_TRIAL = -1


def pipeline_stages(
    make_module: Callable[[StagePlan], nn.Module],
    plan: PipelinePlan,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
) -> list[AttentionResidualsStage]:
    """The stages that this rank runs, in the order of the model: for a schedule of
    ``torch.distributed.pipelining``.

    Every rank of the group calls it.

    Args:
        make_module: Makes the module of a stage. The first stage's is called with the pipeline's
            inputs, the others' with a :class:`SuspendedPass` to be resumed; all but the last return
            what their state's ``suspend`` returns, and that the model's output.
        plan: The routes of all blocks; the same on all ranks.
        device: Where the stages run.
        group: The pipeline's ranks; None means all processes.

    Raises:
        ValueError: If the group has another number of ranks than the plan, or its ranks have
            different plans.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size != plan.num_ranks:
        raise ValueError(
            f"pipeline_stages: the group has {size} ranks, expected {plan.num_ranks} as the plan"
        )
    hashes: list[Any] = [None] * size
    dist.all_gather_object(hashes, plan.hash, group=group)
    others = [other for other, its in enumerate(hashes) if its != plan.hash]
    if others:
        raise ValueError(
            f"pipeline_stages: rank {rank} has plan {plan.hash}, rank {others[0]} has "
            f"{hashes[others[0]]}; expected the same split, ranks and options everywhere"
        )
    rank_blocks = RankBlocks()
    return [
        AttentionResidualsStage(make_module(stage), plan, stage.index, rank_blocks, device, group)
        for stage in plan.stages_of(rank)
    ]


class AttentionResidualsStage(_PipelineStage):
    """One stage of a pipeline, whose rank keeps blocks; :func:`pipeline_stages` makes them.

    Args:
        module: What runs: see :func:`pipeline_stages`.
        plan: The routes of all blocks.
        index: Which stage of the plan.
        rank_blocks: What the rank keeps; all its stages share it.
        device: Where it runs.
        group: The pipeline's ranks; None means all processes.

    Attributes:
        plan: The routes of all blocks.
        blocks: This stage's side of it.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: PipelinePlan,
        index: int,
        rank_blocks: RankBlocks,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(module, index, plan.num_stages, torch.device(device), group=group)
        self.plan, self.blocks = plan, StageBlocks(plan, index, rank_blocks)
        # A schedule of one stage a rank goes by this; others set it themselves.
        self.stage_index_to_group_rank = {stage.index: stage.rank for stage in plan.stages}
        self._microbatch = _TRIAL
        self._before_trial: list[tuple[Tensor, Tensor]] = []
        # Gradients of blocks that were not sent: from the next rank, and for the one before.
        self._received: dict[int, list[Tensor]] = {}
        self._to_send: dict[int, list[Tensor]] = {}

    # Forward

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with the blocks that the rank has."""
        self._microbatch = fwd_chunk_id
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release_buffers(self.args_recv_info[fwd_chunk_id])
        if not self.has_backward:
            self.blocks.drop_graph(fwd_chunk_id)
            self.fwd_cache[fwd_chunk_id] = self.fwd_cache[fwd_chunk_id][0], []
        return output

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, into memory of this microbatch alone."""
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; without a backward nobody asks for what was sent again."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        if not self.has_backward:
            self.fwd_cache.pop(fwd_chunk_id, None)
        return ops

    def _make_buffers(self, received: tuple[Any, ...]) -> None:
        for info in received:
            if info.buffer is None and info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = _receive_buffer(info.tensor_meta, self.device)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; blocks go in and come out beside the tensors that hops bring."""
        return self._with_blocks(super().forward_maybe_with_nosync, args, kwargs)

    def _compute_outputs(self, *args: Any, module: nn.Module, **kwargs: Any) -> Any:
        self._microbatch = _TRIAL
        compute = partial(super()._compute_outputs, module=module)
        return self._with_blocks(compute, args, kwargs)

    def _with_blocks(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        suspended = self.blocks.enter(self._microbatch, args)
        output = run(*(args if suspended is None else (suspended,)), **kwargs)
        return self.blocks.leave(self._microbatch, output)

    # Backward

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """As torch's, with gradients of blocks that the rank has."""
        self._microbatch = bwd_chunk_id
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _release_buffers(self.grad_recv_info.get(bwd_chunk_id, ()))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """As torch's; the first stage does all of its backward here."""
        self._microbatch = bwd_chunk_id
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        """As torch's; blocks that were not sent are outputs and inputs, too.

        Where weights come later, those of one dimension do not.
        """
        if backward_type == "weight":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, *args, **kwargs)
        inputs, microbatch = bwd_kwargs["input_values"], self._microbatch
        leaves = self.blocks.leaves(microbatch)
        # What reads learn comes out of the kernels that find the gradients of their sources.
        vectors = self._vectors() if backward_type == "input" else []
        bwd_kwargs = {**bwd_kwargs, "input_values": [*inputs, *leaves, *vectors]}
        if not self.is_last:
            sent, back = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
            bwd_kwargs["stage_output"], bwd_kwargs["output_grads"] = self.blocks.begin_backward(
                microbatch, sent, back, self._received.pop(microbatch, ())
            )
        gradients, groups = super().backward_maybe_with_nosync(
            backward_type, bwd_kwargs, *args, **kwargs
        )
        rest = gradients[len(inputs) : len(inputs) + len(leaves)]
        to_send = self.blocks.end_backward(microbatch, rest)
        if to_send:
            self._to_send[microbatch] = to_send
        return gradients[: len(inputs)], _without(groups, vectors) if vectors else groups

    def _vectors(self) -> list[Tensor]:
        return [p for p in self.submod.parameters() if p.dim() == 1 and p.requires_grad]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, and gradients of blocks that the rank had."""
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        gradients = self._to_send.pop(bwd_chunk_id, [])
        return ops + self._ops(dist.isend, gradients, self.stage_index - 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, and gradients of blocks that the next rank had."""
        if not self.has_backward or self.is_last:
            return []
        self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        expected = self.blocks.not_sent(bwd_chunk_id)
        received = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in expected]
        self._received[bwd_chunk_id] = received
        return ops + self._ops(dist.irecv, received, self.stage_index + 1)

    def _ops(
        self, operation: Callable[..., Any], tensors: list[Tensor], stage: int
    ) -> list[dist.P2POp]:
        if not tensors:
            return []
        peer = self._resolve_peer_global_rank(stage)
        return [dist.P2POp(operation, tensor, peer, self.group) for tensor in tensors]

    # Schedules go through the motions of a backward in evaluation, too, and torch's stages refuse
    # to hand gradients to a neighbour on the same rank there.

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """As torch's; nothing in evaluation."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int
    ) -> None:
        """As torch's; nothing in evaluation."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # Before and after a step

    def clear_runtime_states(self) -> None:
        """As torch's; drops what a step that did not end left."""
        super().clear_runtime_states()
        self.blocks.clear()
        self._received.clear()
        self._to_send.clear()

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        for stage in self.plan.stages:
            rank = self.stage_index_to_group_rank[stage.index]
            if rank != stage.rank:
                raise ValueError(
                    f"pipeline: the schedule runs stage {stage.index} on rank {rank}, expected "
                    f"{stage.rank} as the plan; place_stages places stages in a loop or in a V"
                )
        # What the microbatch that is sent ahead counts in them is forgotten.
        self._before_trial = [(buffer, buffer.clone()) for buffer in self.submod.buffers()]
        prepared = super()._prepare_forward_infra(*args, **kwargs)
        # One set of buffers a microbatch would be there all the time.
        for received in self.args_recv_info.values():
            _release_buffers(received)
        return prepared

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_backward_infra(*args, **kwargs)
        for received in self.grad_recv_info.values():
            _release_buffers(received)
        return prepared

    @torch.no_grad()
    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        for buffer, before in self._before_trial:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
        self._before_trial = []
        self.blocks.clear(_TRIAL)


def _release_buffers(received: tuple[Any, ...]) -> None:
    for info in received:
        info.buffer = None


def _without(groups: list[dict[str, Any]], parameters: list[Tensor]) -> list[dict[str, Any]]:
    """What is left to do for other parameters, when the gradients of these are there."""
    done = {get_gradient_edge(parameter).node for parameter in parameters}
    for group in groups:
        group["params"] -= done
    return [group for group in groups if group["params"]]
