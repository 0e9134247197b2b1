"""Stages for ``torch.distributed.pipelining`` whose ranks keep blocks for their later stages.

Cross-stage caching (paper, section 3.2): a hop brings what its receiver lacks, one tensor a block,
and the sum that is open. Schedules, sends and the backward are torch's own; a stage adds to each
forward the blocks that its rank has, and to each backward their gradients. Which these are says a
:class:`PipelinePlan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from attnres_ext.parallel.rank_blocks import RankBlocks
from attnres_ext.parallel.routing import Hop, PipelinePlan, StagePlan
from attnres_ext.suspended import SuspendedPass
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
    blocks = RankBlocks()
    return [
        AttentionResidualsStage(make_module(stage), plan, stage.index, blocks, device, group)
        for stage in plan.stages_of(rank)
    ]


@dataclass
class _Run:
    """What a microbatch's forward through a stage leaves for its backward.

    Attributes:
        leaves: Blocks that the rank had, as this stage's leaves.
        blocks: All blocks, as the stage hands them on.
        received: Gradients of blocks that were not sent, from the next rank.
    """

    leaves: dict[int, Tensor]
    blocks: tuple[Tensor, ...] = ()
    received: dict[int, Tensor] = field(default_factory=dict)


class AttentionResidualsStage(_PipelineStage):
    """One stage of a pipeline, whose rank keeps blocks; :func:`pipeline_stages` makes them.

    Args:
        module: What runs: see :func:`pipeline_stages`.
        plan: The routes of all blocks.
        index: Which stage of the plan.
        blocks: What the rank keeps; all its stages share it.
        device: Where it runs.
        group: The pipeline's ranks; None means all processes.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: PipelinePlan,
        index: int,
        blocks: RankBlocks,
        device: torch.device | str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(module, index, plan.num_stages, torch.device(device), group=group)
        self.plan, self.blocks = plan, blocks
        # A schedule of one stage a rank goes by this; others set it themselves.
        self.stage_index_to_group_rank = {stage.index: stage.rank for stage in plan.stages}
        self._microbatch = _TRIAL
        self._before_trial: list[tuple[Tensor, Tensor]] = []
        self._runs: dict[int, _Run] = {}
        self._to_send: dict[int, list[Tensor]] = {}

    @cached_property
    def _stage(self) -> StagePlan:
        return self.plan.stages[self.stage_index]

    @cached_property
    def _hop(self) -> Hop | None:
        """The hop to the next stage."""
        return None if self.is_last else self.plan.hops[self.stage_index]

    @cached_property
    def _hop_before(self) -> Hop | None:
        return None if self.is_first else self.plan.hops[self.stage_index - 1]

    # Forward

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with the blocks that the rank has."""
        self._microbatch = fwd_chunk_id
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release_buffers(self.args_recv_info[fwd_chunk_id])
        if not self.has_backward:
            self._runs.pop(fwd_chunk_id, None)
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

        def compute(*args: Any, **kwargs: Any) -> Any:
            return super(AttentionResidualsStage, self)._compute_outputs(
                *args, module=module, **kwargs
            )

        return self._with_blocks(compute, args, kwargs)

    def _with_blocks(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        leaves = {}
        if not self.is_first:
            leaves = {b: self.blocks.leaf(self._microbatch, b) for b in self._stage.cached}
            args = (self._assemble(args, leaves),)
        output = run(*args, **kwargs)
        self._runs[self._microbatch] = _Run(leaves)
        if not self.is_last:
            output = self._hand_on(output)
        for kept in self.plan.kept_by(self._stage.rank):
            if kept.last_forward == self.stage_index:
                self.blocks.drop(self._microbatch, kept.block)
        return output

    def _assemble(self, received: tuple[Tensor, ...], leaves: dict[int, Tensor]) -> SuspendedPass:
        stage = self._stage
        blocks = {**leaves, **dict(zip(stage.receives, received[:-1], strict=True))}
        ordered = tuple(blocks[block] for block in sorted(blocks))
        return SuspendedPass(stage.first_site, ordered, None, received[-1])

    def _hand_on(self, suspended: Any) -> tuple[Tensor, ...]:
        """What is sent; and keeps what later stages of the rank take."""
        stage = self._stage
        self._check(suspended)
        suspended = suspended.summed()
        blocks, open_sum = suspended.blocks, suspended.pending
        for block in stage.keeps:
            value = open_sum if block == stage.finishes else blocks[block]
            self.blocks.keep(self._microbatch, block, value)
        self._runs[self._microbatch].blocks = blocks
        return tuple(_dense(t) for t in (*(blocks[b] for b in self._hop.blocks), open_sum))

    def _check(self, suspended: Any) -> None:
        stage = self._stage
        if not isinstance(suspended, SuspendedPass):
            raise TypeError(
                f"pipeline: the module of stage {stage.index} returned a "
                f"{type(suspended).__name__}, expected what its state's suspend returns"
            )
        if suspended.site != stage.end_site or suspended.pending is None:
            raise ValueError(
                f"pipeline: the module of stage {stage.index} stopped before site "
                f"{suspended.site}{'' if suspended.pending is not None else ' was written for'}, "
                f"expected it to write what site {stage.end_site} reads, and stop"
            )
        embedding = suspended.blocks[0] if suspended.blocks else None
        frozen = not self.plan.embedding_gradient
        if frozen and embedding is not None and embedding.requires_grad:
            raise ValueError(
                "pipeline: the embedding requires a gradient, expected none: the plan was made "
                "with embedding_gradient=False"
            )

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
        run, count = self._runs.pop(self._microbatch), len(bwd_kwargs["input_values"])
        # What reads learn comes out of the kernels that find the gradients of their sources.
        vectors = self._vectors() if backward_type == "input" else []
        inputs = [*bwd_kwargs["input_values"], *run.leaves.values(), *vectors]
        bwd_kwargs = {**bwd_kwargs, "input_values": inputs}
        if not self.is_last:
            bwd_kwargs["stage_output"], bwd_kwargs["output_grads"] = self._begin(
                run, bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
            )
        gradients, groups = super().backward_maybe_with_nosync(
            backward_type, bwd_kwargs, *args, **kwargs
        )
        self._hand_back(run.leaves, gradients[count : count + len(run.leaves)])
        if vectors:
            groups = _without(groups, vectors)
        return gradients[:count], groups

    def _vectors(self) -> list[Tensor]:
        return [p for p in self.submod.parameters() if p.dim() == 1 and p.requires_grad]

    def _begin(
        self, run: _Run, outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Outputs and their gradients, with those of blocks that went another way."""
        outputs, gradients = list(outputs), list(gradients)
        slots = {
            block: slot for slot, block in enumerate((*self._hop.blocks, self._stage.finishes))
        }
        for entry in self._stage.gradients:
            if not entry.begins_with:
                continue
            block, slot = entry.block, slots.get(entry.block)
            left = run.received.pop(block, None)
            if left is None:
                left = self.blocks.take_gradient(self._microbatch, block)
            if left is None:
                continue
            if slot is None:
                outputs.append(run.blocks[block])
                gradients.append(left)
            else:
                sent_back = gradients[slot]
                gradients[slot] = left if sent_back is None else left + sent_back
        return tuple(outputs), tuple(gradients)

    def _hand_back(self, leaves: dict[int, Tensor], gradients: tuple[Tensor | None, ...]) -> None:
        """Gradients of blocks that the rank had: to its earlier stage, or to the one before."""
        ways = {entry.block: entry.goes_to for entry in self._stage.gradients}
        for (block, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if not leaf.requires_grad:
                continue
            if gradient is None:
                gradient = torch.zeros_like(leaf)
            if ways[block] == "previous" and self._hop_before.crosses:
                self._to_send.setdefault(self._microbatch, []).append(gradient.contiguous())
            else:
                self.blocks.leave_gradient(self._microbatch, block, gradient)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, and gradients of blocks that the rank had."""
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        gradients = self._to_send.pop(bwd_chunk_id, ())
        if gradients:
            peer = self._resolve_peer_global_rank(self.stage_index - 1)
            ops += [dist.P2POp(dist.isend, tensor, peer, self.group) for tensor in gradients]
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, and gradients of blocks that the next rank had."""
        if not self.has_backward or self.is_last:
            return []
        self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        if not self._hop.crosses:
            return ops
        run, peer = self._runs[bwd_chunk_id], None
        for block in self._hop.gradients:
            if block in self._hop.blocks or not run.blocks[block].requires_grad:
                continue
            peer = self._resolve_peer_global_rank(self.stage_index + 1) if peer is None else peer
            like = run.blocks[block]
            buffer = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            run.received[block] = buffer
            ops.append(dist.P2POp(dist.irecv, buffer, peer, self.group))
        return ops

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
        self._runs.clear()
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
        self._runs.pop(_TRIAL, None)


def _release_buffers(received: tuple[Any, ...]) -> None:
    for info in received:
        info.buffer = None


def _without(groups: list[dict[str, Any]], parameters: list[Tensor]) -> list[dict[str, Any]]:
    """What is left to do for other parameters, when the gradients of these are there."""
    done = {get_gradient_edge(parameter).node for parameter in parameters}
    for group in groups:
        group["params"] -= done
    return [group for group in groups if group["params"]]


def _dense(tensor: Tensor) -> Tensor:
    """Fit to be sent, and to be detached in place."""
    if not tensor.requires_grad:
        tensor = tensor.detach()
    if tensor._is_view() or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
