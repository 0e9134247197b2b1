"""The state of a forward pass that gradients go through, and what activation checkpointing repeats
of it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnres_ext import ops
from attnres_ext.gradient_buffer import (
    GradientBuffer,
    after,
    can_gather,
    can_tap,
    tap_all,
    tap_with_end,
)
from attnres_ext.phase_one import FunctionalPhaseOne, GatheringPhaseOne, PhaseOneResults
from attnres_ext.randomness import go_back_to, register_as_argument, where_it_stands
from attnres_ext.recomputation import Region, Snapshot, keep, unseen, unselected
from attnres_ext.residual_graph import ReadInGraph
from attnres_ext.residual_state import Reading, ResidualState
from attnres_ext.suspended import SuspendedPass, hand_over
from attnres_ext.torch_internals import StopRecomputation, backward_pass, saving_hook

if TYPE_CHECKING:
    from attnres_ext.residual import AttentionResiduals

__all__ = ["TrainingState"]

_graph = torch.ops.attnres_residual


class _BlockState(ResidualState):
    """Blocks are a list of tensors."""

    def __init__(self, residual: AttentionResiduals, embedding: Tensor | None) -> None:
        super().__init__(residual, embedding)
        self._blocks: list[Tensor] = []
        self._buffers: list[GradientBuffer | None] = []
        self._partial: Tensor | None = None
        # Phase 1 of the open block; None while sites read in a single pass.
        self._phase: GatheringPhaseOne | FunctionalPhaseOne | None = None

    def _append_block(self, block: Tensor, buffer: GradientBuffer | None = None) -> None:
        self._blocks.append(block)
        self._buffers.append(buffer)

    @abstractmethod
    def _begin_phase(self, block: int) -> None:
        """Runs phase 1 for the sites of ``block``."""

    def _phase_weights(self, block: int) -> tuple[Tensor, Tensor, float]:
        """Queries and key gains ``[S, D]`` of a block's sites, and the keys' epsilon."""
        residual = self._residual
        sites = self._sites_read_together(block)
        queries = torch.stack([residual.queries[site] for site in sites])
        return queries, torch.stack([residual.key_weights[site] for site in sites]), residual.eps

    def _mix(self, site: int, delta: Tensor, reading: Reading, save: str) -> Tensor:
        """Reads ``site`` and moves on: afterwards the last source is the open sum or a block."""
        residual = self._residual
        closes = residual.closes_block(site)
        self._begin_block(site, delta)
        if self._phase is not None:
            index = site - self._sites_read_together(len(self._blocks))[0]
            hidden, partial = self._phase.merge(index, self._partial, delta, reading)
        elif closes and self._partial is None:
            # The delta is a block: as one, it gets all its gradients, this site's too, in its
            # buffer.
            self._append_block(delta)
            return ops.depth_attention(self._blocks, **self._single_pass(reading, save))
        else:
            hidden, partial = ops.accumulate_depth_attention(
                self._partial, delta, self._blocks, **self._single_pass(reading, save)
            )
        self._partial = None if closes else partial
        if closes:
            self._append_block(partial)
        return hidden

    def _single_pass(self, reading: Reading, save: str) -> dict[str, Any]:
        eps, buffers = self._residual.eps, tuple(self._buffers)
        return {**reading, "eps": eps, "save": save, "buffers": buffers}

    def _begin_block(self, site: int, delta: Tensor) -> None:
        """At the first site of a block, attends over the finished blocks for all of its sites,
        where that pays."""
        if self._partial is not None or site == 0:
            return
        self._phase = None
        block = len(self._blocks)
        if self._residual.reads_in_two_phases(block, delta, torch.is_grad_enabled()):
            self._begin_phase(block)


class TrainingState(_BlockState):
    """Differentiable: the gradients of each block gather in one buffer.

    Reads may be repeated by ``torch.utils.checkpoint`` (``use_reentrant=False``): see
    :mod:`attnres_ext.recomputation`.
    """

    def __init__(self, residual: AttentionResiduals, embedding: Tensor | None) -> None:
        super().__init__(residual, embedding)
        self._has_gradients = torch.is_grad_enabled()
        # For graphs: what makes the reads' order, and who hands gradients to the parameters.
        self._last: Tensor | None = None  # the open sum, or in the place of it the last block
        self._ticket: Tensor | None = None
        self._read_by_graph = False  # whether a graph made the last read
        self._open = False  # whether a sum was open after it
        self._region: Region | None = None  # where the last read under a checkpoint was
        self._recomputes_block = False  # whether the open block was read under one
        self._snapshots: dict[int, weakref.ref[Snapshot]] = {}  # by site
        self._results: dict[int, weakref.ref[PhaseOneResults]] = {}  # by block
        self._orphans: list[Snapshot] = []  # snapshots of reads that have no node in the graph
        self._repetition: _Repetition | None = None

    def _suspend(self) -> SuspendedPass:
        self._check_gradients("suspend")
        if self._read_by_graph:
            self._leave_graph()
        suspended = SuspendedPass(self._site, tuple(self._blocks), self._partial, self._pending)
        suspended = hand_over(suspended, tuple(self._buffers), self._last)
        self._forget()
        return suspended

    def _go_on(self, suspended: SuspendedPass) -> None:
        super()._go_on(suspended)
        self._partial = suspended.partial
        self._blocks = list(suspended.blocks)
        self._buffers = [GradientBuffer() if can_tap(block) else None for block in self._blocks]
        if self._blocks:
            self._last = self._blocks[-1]
        tapped = [index for index, buffer in enumerate(self._buffers) if buffer is not None]
        if tapped:
            blocks, self._last = tap_all(
                [self._blocks[index] for index in tapped],
                [self._buffers[index] for index in tapped],
            )
            for index, block in zip(tapped, blocks, strict=True):
                self._blocks[index] = block
        if self._partial is None:
            return
        # Compiled reads hang together by the sum: backward goes from there to phase 1 and to the
        # blocks, as in a pass that was never cut.
        if tapped:
            self._partial = after(self._partial, self._last)
        block = len(self._blocks)
        if block and self._residual.reads_in_two_phases(block, self._partial, self._has_gradients):
            self._begin_phase(block)
        if isinstance(self._phase, GatheringPhaseOne):
            self._partial = after(self._partial, self._phase.token)
        self._last = self._partial

    def write(self, x: Tensor) -> None:
        """Adds a sublayer's output; when that is repeated, to what is repeated.

        Arguments and errors as for :meth:`ResidualState.write`.
        """
        self._check_gradients("write")
        repetition = self._repetition
        if self.in_graph():
            super().write(x)
        elif repetition is not None and repetition.region.contains(saving_hook()):
            repetition.write(x)
        elif self._expects_write() or not _recomputing():
            super().write(x)
        # Else a checkpointed function that begins with a write is repeated: what it writes is in
        # the snapshot of the read that follows, or nobody reads it again.

    def pass_on(self, x: Tensor) -> None:
        """Replaces what waits; when the function that does it is repeated, what it repeats.

        Arguments and errors as for :meth:`ResidualState.pass_on`.
        """
        repetition = self._repetition
        if self.in_graph():
            super().pass_on(x)
        elif repetition is not None and repetition.region.contains(saving_hook()):
            repetition.pass_on(x)
        elif self._pending is not None or not _recomputing():
            super().pass_on(x)

    def _expects_write(self) -> bool:
        over = self._is_suspended or self._site == self._residual.num_sites
        return self._pending is None and not over

    def _take_turn(self, site: int, norm_weight: Tensor | None, norm_eps: float | None) -> Tensor:
        if site < self._site and not torch.compiler.is_compiling():
            repetition = self._repeat(site)
            if repetition is not None:
                return repetition._take_turn(site, norm_weight, norm_eps)
        self._check_gradients("read")
        if self._read_by_graph:
            self._leave_graph()
        return super()._take_turn(site, norm_weight, norm_eps)

    def _check_gradients(self, call: str) -> None:
        """Refuses a stretch without gradients in a forward pass with them, and the reverse:
        autograd cannot follow what goes in and out of it inside of the state."""
        if torch.is_grad_enabled() == self._has_gradients:
            return
        if self._has_gradients:
            found = "gradients are off, but this forward pass began with them: what is read and "
            found += "written here would get none"
        else:
            found = "gradients are on, but this forward pass began without them: the embedding "
            found += "gets none"
        raise RuntimeError(
            f"{call}: {found}. torch.utils.checkpoint does this with use_reentrant=True: pass "
            "use_reentrant=False. To leave gradients out, begin without them (torch.no_grad around "
            "start, too), or freeze parameters with requires_grad_(False)"
        )

    def _repeat(self, site: int) -> _Repetition | None:
        """Who repeats the read of ``site``; None if nobody can."""
        hook = saving_hook()
        if hook is None:
            return None
        repetition = self._repetition
        if repetition is None or not repetition.region.contains(hook):
            if self.snapshot_at(site) is None:
                return None
            repetition = self._repetition = _Repetition(self, Region(hook))
        return repetition

    def snapshot_at(self, site: int) -> Snapshot | None:
        """What is kept to repeat the read of ``site``, if anything."""
        reference = self._snapshots.get(site)
        snapshot = None if reference is None else reference()
        if reference is not None and snapshot is None and _recomputing():
            # The read's node has run and is gone, and with it all that depends on it.
            raise StopRecomputation
        return snapshot

    def results_of(self, block: int) -> PhaseOneResults | None:
        """What phase 1 found for ``block``, if that is still of use to anybody."""
        reference = self._results.get(block)
        return None if reference is None else reference()

    def _read(self, site: int, delta: Tensor, reading: Reading) -> Tensor:
        snapshot = self._enter_region()
        if snapshot is None:
            hidden = self._mix(site, delta, reading, self._residual.save)
        else:
            # The node keeps its sources, and no more than them.
            with keep(snapshot), unselected():
                hidden = self._mix(site, delta, reading, "nothing")
            self._complete(site, snapshot, hidden)
        self._recomputes_block |= self._in_region()
        if self._residual._record is not None:
            self._record(site, self._sources(), reading)
        if self._partial is not None:
            self._last = self._partial
        if site == self._residual.num_sublayers:
            self._forget()
        return hidden

    def _read_in_graph(
        self, norm_weight: Tensor | None, norm_eps: float | None, scale: str = ""
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super()._read_in_graph(norm_weight, norm_eps, scale)
        self._check_norm(norm_weight)
        residual = self._residual
        if self._ticket is None and residual.variant.attends:
            sites = residual.sites
            parameters = (
                [vectors[site] for site in sites]
                for vectors in (residual.queries, residual.key_weights)
            )
            self._ticket = _graph.sites.default(self._cursor, *parameters)
        hidden, self._last, self._cursor = _graph.read.default(
            self._cursor, self._ticket, self._last, self._take_pending(), norm_weight, norm_eps,
            scale, self._width,
        )  # fmt: skip
        return hidden

    def next_in_graph(self, delta: Tensor) -> ReadInGraph:
        """What a graph's read needs of the state, which moves on; ``delta`` ``[..., D]`` was
        written."""
        self._check_written(delta)
        residual, site = self._residual, self._site
        self._check_going_on("read")
        if site == residual.num_sites:
            raise RuntimeError("read: every site is read; sites are read once and in order")
        self._check_kept(site)
        begins = not self._open if self._read_by_graph else self._partial is None
        if begins and site > 0:
            self._end_phase()
            if residual.reads_in_two_phases(len(self._blocks), delta, training=True):
                results = PhaseOneResults(self._blocks, *self._phase_weights(len(self._blocks)))
                results.needs_gradient = True
                self._phase = GatheringPhaseOne.again(results)
        phase, index = self._phase, 0
        if phase is not None:
            index = site - self._sites_read_together(len(self._blocks))[0]
        needs = [block.requires_grad for block in self._blocks]
        gathers = all(buffer for buffer, need in zip(self._buffers, needs, strict=True) if need)
        if not gathers or isinstance(phase, FunctionalPhaseOne):
            raise RuntimeError(
                "read: a compiled layer follows reads whose gradients could not gather in buffers "
                "(a function transform, or hooks of saved tensors switched off); compile the whole "
                "model there, or the sublayers alone"
            )
        self._site += 1
        query, key_weight = residual.vectors_at(site)
        return ReadInGraph(
            site=site,
            blocks=[block.detach() for block in self._blocks],
            needs=needs,
            buffers=tuple(self._buffers),
            query=query.detach(),
            key_weight=None if key_weight is None else key_weight.detach(),
            begins=begins,
            phase=None if phase is None else phase.results,
            index=index,
            runs_phase=phase is not None and begins,
        )

    def after_graph(self, read: ReadInGraph, value: Tensor) -> None:
        """Notes what a graph read; ``value`` ``[..., D]`` was its last source."""
        residual = self._residual
        self._read_by_graph, self._partial, self._open = True, None, read.closed is None
        if read.closed is not None:
            # Its gradient goes through the buffer alone.
            self._blocks.append(read.closed.detach().requires_grad_())
            self._buffers.append(read.buffer)
        if residual._record is not None:
            reading = Reading(
                query=read.query, key_weight=read.key_weight, out_weight=None, out_eps=None
            )
            self._record(read.site, [*read.blocks, value], reading)
        if read.site == residual.num_sublayers:
            self._forget()

    def _leave_graph(self) -> None:
        """Goes on in eager mode from where a graph ended."""
        self._read_by_graph = False
        if self._open:
            self._partial = self._last
        elif self._pending is not None and self._last.requires_grad:
            # The next read adds to the buffer of the block that the graph closed.
            self._pending = after(self._pending, self._last)

    def sources_with(self, delta: Tensor) -> list[Tensor]:
        """What the next site would attend over, were ``delta`` ``[..., D]`` written; it is not."""
        return [*self._blocks, delta if self._partial is None else self._partial + delta]

    def _sources(self) -> list[Tensor]:
        """What was read last; the last of them is the open sum, if there is one."""
        return self._blocks if self._partial is None else [*self._blocks, self._partial]

    def _enter_region(self) -> Snapshot | None:
        """A snapshot to be completed, if this is the first read under a checkpoint."""
        if not can_gather():
            return None
        hook = saving_hook()
        if hook is None or self._in_region():
            return None
        self._region = Region(hook)
        return Snapshot(self._blocks, where_it_stands(self._device))

    def _in_region(self) -> bool:
        return self._region is not None and self._region.contains(saving_hook())

    def _complete(self, site: int, snapshot: Snapshot, hidden: Tensor) -> None:
        phase = self._phase
        snapshot.complete(hidden, self._sources()[-1], None if phase is None else phase.results)
        self._snapshots[site] = weakref.ref(snapshot)
        if not hidden.requires_grad:
            self._orphans.append(snapshot)

    def _forget(self) -> None:
        """The forward pass is over: what is still needed, the graph keeps."""
        self._end_phase()
        self._blocks, self._buffers, self._partial = [], [], None
        self._last = self._ticket = None

    def _append_block(self, block: Tensor) -> None:
        self._last, buffer = block, None
        if can_tap(block):
            buffer = GradientBuffer()
            block, self._last = tap_with_end(block, buffer)
        super()._append_block(block, buffer)

    def _begin_block(self, site: int, delta: Tensor) -> None:
        if self._partial is None:
            self._end_phase()
        super()._begin_block(site, delta)

    def _begin_phase(self, block: int) -> None:
        if not can_gather():
            self._phase = FunctionalPhaseOne(self._blocks, *self._phase_weights(block))
            return
        with unselected():
            self._phase = GatheringPhaseOne.over(
                self._blocks, tuple(self._buffers), *self._phase_weights(block)
            )
        self._results[block] = weakref.ref(self._phase.results)

    def _end_phase(self) -> None:
        """Under a checkpoint phase 1 is recomputed with everything else, once a block."""
        phase, self._phase = self._phase, None
        recomputes, self._recomputes_block = self._recomputes_block, False
        if isinstance(phase, GatheringPhaseOne) and (
            recomputes or self._residual.save == "nothing"
        ):
            phase.results.drop()


register_as_argument(TrainingState)


class _Repetition(_BlockState):
    """Reads again what a :class:`TrainingState` read under a checkpoint.

    What comes of it are the tensors that autograd would have saved; no gradient ever flows through
    it. So it has neither taps nor buffers, and phase 1 is the first forward's.

    Args:
        state: Whose reads are repeated.
        region: The recomputation.
    """

    def __init__(self, state: TrainingState, region: Region) -> None:
        self._residual = state._residual
        self._shape, self._device, self._width = state._shape, state._device, state._width
        self._first_site, self._is_suspended = state._first_site, False
        self._of = weakref.ref(state)  # which holds this
        self.region = region

    @property
    def _state(self) -> TrainingState:
        return self._of()

    def _take_turn(self, site: int, norm_weight: Tensor | None, norm_eps: float | None) -> Tensor:
        snapshot = self._state.snapshot_at(site)
        if snapshot is not None:
            self._go_to(site, snapshot)
        return super()._take_turn(site, norm_weight, norm_eps)

    def _go_to(self, site: int, snapshot: Snapshot) -> None:
        go_back_to(self._device, snapshot.randomness)
        self._site, self._pending = site, snapshot.value
        self._blocks = [
            _leaf(block, need) for block, need in zip(snapshot.blocks, snapshot.needs, strict=True)
        ]
        self._buffers = [None] * len(self._blocks)
        self._partial = None
        results = snapshot.phase
        self._phase = None if results is None else GatheringPhaseOne.again(results)

    def _read(self, site: int, delta: Tensor, reading: Reading) -> Tensor:
        snapshot = self._state.snapshot_at(site)
        if snapshot is None:
            return self._mix(site, delta, reading, self._residual.save)
        with torch.no_grad(), unseen():
            hidden = self._read_snapshot(snapshot, reading)
        value = _leaf(snapshot.value, snapshot.value_needs)
        if self._residual.closes_block(site):
            self._append_block(value)
        else:
            self._partial = value
        return _leaf(hidden, snapshot.hidden_needs)

    def _read_snapshot(self, snapshot: Snapshot, reading: Reading) -> Tensor:
        eps = self._residual.eps
        if self._phase is None:
            return ops.depth_attention([*snapshot.blocks, snapshot.value], **reading, eps=eps)
        index = self._site - 1 - self._sites_read_together(len(self._blocks))[0]
        out, lse, _ = self._phase.results.get()
        hidden, _ = ops.merge_partial(
            out[index], lse[index], snapshot.value, None, **reading, eps=eps
        )
        return hidden

    def _begin_phase(self, block: int) -> None:
        results = self._state.results_of(block)
        if results is None:
            with unseen():
                results = PhaseOneResults(self._blocks, *self._phase_weights(block))
        self._phase = GatheringPhaseOne.again(results)


def _leaf(tensor: Tensor, needs_gradient: bool) -> Tensor:
    """An alias that autograd treats as it treated the first forward's tensor: it saves what it
    saved then."""
    return tensor.detach().requires_grad_(needs_gradient)


def _recomputing() -> bool:
    """Whether a backward pass is under way."""
    return backward_pass() != -1
