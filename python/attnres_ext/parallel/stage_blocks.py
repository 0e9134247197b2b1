"""The blocks of one stage: what goes in and comes out of its forward and its backward beside the
tensors that hops bring.

Whoever runs a pipeline sends and receives, and calls autograd; here is decided with what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_ext.parallel.rank_blocks import RankBlocks
from attnres_ext.parallel.routing import PipelinePlan
from attnres_ext.suspended import SuspendedPass

__all__ = ["StageBlocks"]


@dataclass
class _Run:
    """What a microbatch's forward through a stage leaves for its backward.

    Attributes:
        leaves: Blocks that the rank had, as this stage's leaves.
        blocks: All blocks, as the stage hands them on.
    """

    leaves: dict[int, Tensor]
    blocks: tuple[Tensor, ...] = ()


class StageBlocks:
    """One stage's side of a plan.

    A microbatch's forward is :meth:`enter`, the stage's module, :meth:`leave`; its backward
    :meth:`begin_backward`, autograd, :meth:`end_backward`.

    Args:
        plan: The routes of all blocks.
        index: Which stage.
        rank_blocks: What the rank keeps; all its stages share it.

    Attributes:
        stage: Its entry in the plan.
        hop: To the next stage; None for the last.
        hop_before: From the stage before; None for the first.
    """

    def __init__(self, plan: PipelinePlan, index: int, rank_blocks: RankBlocks) -> None:
        self.plan, self.stage = plan, plan.stages[index]
        self.hop = plan.hops[index] if index < len(plan.hops) else None
        self.hop_before = plan.hops[index - 1] if index > 0 else None
        self._kept = rank_blocks
        self._runs: dict[int, _Run] = {}
        self._ways = {entry.block: entry.goes_to for entry in self.stage.gradients}

    # Forward

    def enter(self, microbatch: int, received: Sequence[Tensor] = ()) -> SuspendedPass | None:
        """Where the stage's module goes on.

        Args:
            microbatch: Which one.
            received: What the stage before sent: blocks and the open sum ``[..., D]``, leaves.

        Returns:
            The pass to be resumed; None for the first stage, which begins it.
        """
        leaves = {block: self._kept.leaf(microbatch, block) for block in self.stage.cached}
        self._runs[microbatch] = _Run(leaves)
        if self.hop_before is None:
            return None
        blocks = {**leaves, **dict(zip(self.stage.receives, received[:-1], strict=True))}
        ordered = tuple(blocks[block] for block in sorted(blocks))
        return SuspendedPass(self.stage.first_site, ordered, None, received[-1])

    def leave(self, microbatch: int, output: Any) -> Any:
        """What is sent to the next stage, and is kept for later stages of the rank.

        Args:
            microbatch: Which one.
            output: What the stage's module returned: a :class:`SuspendedPass`, or of the last
                stage anything.

        Returns:
            The blocks of the hop and the open sum, each a tensor of its own; of the last stage,
            ``output``.

        Raises:
            TypeError: If ``output`` is no suspended pass.
            ValueError: If it is one at another place, or its embedding requires a gradient that the
                plan knows nothing of.
        """
        if self.hop is not None:
            self._check(output)
            output = output.summed()
            blocks, open_sum = output.blocks, output.pending
            for block in self.stage.keeps:
                value = open_sum if block == self.stage.finishes else blocks[block]
                self._kept.keep(microbatch, block, value)
            self._runs[microbatch].blocks = blocks
            output = tuple(_dense(t) for t in (*(blocks[b] for b in self.hop.blocks), open_sum))
        for kept in self.plan.kept_by(self.stage.rank):
            if kept.last_forward == self.stage.index:
                self._kept.drop(microbatch, kept.block)
        return output

    def _check(self, suspended: Any) -> None:
        stage = self.stage
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
        frozen = not self.plan.embedding_gradient
        if frozen and suspended.blocks and suspended.blocks[0].requires_grad:
            raise ValueError(
                "pipeline: the embedding requires a gradient, expected none: the plan was made "
                "with embedding_gradient=False"
            )

    # Backward

    def leaves(self, microbatch: int) -> list[Tensor]:
        """Blocks that the rank had: inputs of the stage beside what was received."""
        return list(self._runs[microbatch].leaves.values())

    def not_sent(self, microbatch: int) -> list[Tensor]:
        """Blocks that the next rank had, of which it sends gradients all the same, in this order,
        after those of what it received."""
        if self.hop is None or not self.hop.crosses:
            return []
        blocks = self._runs[microbatch].blocks
        return [
            blocks[block]
            for block in self.hop.gradients
            if block not in self.hop.blocks and blocks[block].requires_grad
        ]

    def begin_backward(
        self,
        microbatch: int,
        sent: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        of_not_sent: Sequence[Tensor] = (),
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """What the backward of the stage begins with.

        Args:
            microbatch: Which one.
            sent: What :meth:`leave` returned.
            gradients: Theirs, from the next stage.
            of_not_sent: Gradients of :meth:`not_sent`.

        Returns:
            Outputs and their gradients, for autograd.
        """
        blocks, hop = self._runs[microbatch].blocks, self.hop
        others = zip(map(id, self.not_sent(microbatch)), of_not_sent, strict=True)
        come_back = dict(others)
        outputs, gradients = list(sent), list(gradients)
        slots = {block: slot for slot, block in enumerate((*hop.blocks, self.stage.finishes))}
        for entry in self.stage.gradients:
            if not entry.begins_with:
                continue
            slot = slots.get(entry.block)
            left = self._kept.take_gradient(microbatch, entry.block)
            if slot is None:
                output = blocks[entry.block]
                left = come_back.get(id(output), left)
                if left is not None:
                    outputs.append(output)
                    gradients.append(left)
            elif left is not None:
                back = gradients[slot]
                gradients[slot] = left if back is None else left + back
        return tuple(outputs), tuple(gradients)

    def end_backward(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Leaves gradients of blocks that the rank had where they go.

        Args:
            microbatch: Which one; nothing of it is kept here any longer.
            gradients: Of each of :meth:`leaves`.

        Returns:
            Those to be sent to the stage before, after those of what was received.
        """
        to_send = []
        leaves = self._runs.pop(microbatch).leaves
        for (block, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if not leaf.requires_grad:
                continue
            if gradient is None:
                gradient = torch.zeros_like(leaf)
            if self._ways[block] == "previous" and self.hop_before.crosses:
                to_send.append(gradient.contiguous())
            else:
                self._kept.leave_gradient(microbatch, block, gradient)
        return to_send

    def clear(self, microbatch: int | None = None) -> None:
        """Gives up everything, or what is left of one microbatch; the rank's blocks, too."""
        self._kept.clear(microbatch)
        if microbatch is None:
            self._runs.clear()
        else:
            self._runs.pop(microbatch, None)

    def drop_graph(self, microbatch: int) -> None:
        """There will be no backward: only what the rank keeps stays."""
        self._runs.pop(microbatch, None)

    def __len__(self) -> int:
        """How many microbatches are under way."""
        return len(self._runs)


def _dense(tensor: Tensor) -> Tensor:
    """Fit to be sent, and to be detached in place."""
    if not tensor.requires_grad:
        tensor = tensor.detach()
    if tensor._is_view() or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor
