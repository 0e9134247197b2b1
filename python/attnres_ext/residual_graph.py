"""Reads inside of a layer that is compiled by itself.

Trainers compile each layer alone, because equal layers then share one graph. Two sites differ in
what a graph would be made anew for: their number, how many sources they have, whether they close a
block. So a graph sees none of it. A read is one operator there, the same for every site: it takes
what was written, the open sum and a *cursor*, and finds everything else, sources first, in the
:class:`Reads` that the cursor points to.

What a graph does see is what must stay in order. The sum goes from read to read, forward and, as a
gradient, backward: so gradients of finished blocks may gather in their buffers as they do in eager
mode, and whoever hands a buffer on comes after all who add to it. Gradients of queries and key
gains gather the same way, and ``sites``, whose *ticket* every read takes, hands them on.
"""

from __future__ import annotations

import itertools
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from attnres_ext.autograd import Options, accumulate_gradients, below_autograd
from attnres_ext.gradient_buffer import GradientBuffer
from attnres_ext.phase_one import PhaseOneResults, merge_gradients
from attnres_ext.profiling import naming
from attnres_ext.torch_internals import backward_pass, keeps_graph

if TYPE_CHECKING:
    from attnres_ext.residual_cached import CachedState
    from attnres_ext.residual_training import TrainingState

__all__ = ["CHECKPOINTS", "ReadInGraph", "Reads"]

_ops = torch.ops.attnres

#: What to do about graphs that a checkpoint repeats.
CHECKPOINTS = (
    "Under activation checkpointing, reads inside of the checkpointed function need "
    "torch.utils.checkpoint with use_reentrant=False, and must not be compiled: compile around the "
    "checkpoint, or the sublayers alone"
)


@dataclass(eq=False, slots=True)
class ReadInGraph:
    """What a read's backward needs beside what its graph saves.

    Attributes:
        site: Which site.
        blocks: Finished blocks before it, detached.
        needs: Which of them require a gradient.
        buffers: Where their gradients gather.
        query: The site's, detached.
        key_weight: The site's, detached.
        begins: Whether what was written begins a sum.
        closed: The block that the read closed, if it closed one.
        buffer: Where that block's gradient gathers.
        phase: Phase 1 of the open block, in two phases.
        index: Of the site in its block.
        runs_phase: Whether phase 1 ran here, so that its backward does.
        stats: What the kernel kept.
        mix: What the kernel kept.
    """

    site: int
    blocks: list[Tensor]
    needs: list[bool]
    buffers: tuple[GradientBuffer | None, ...]
    query: Tensor
    key_weight: Tensor | None
    begins: bool
    closed: Tensor | None = None
    buffer: GradientBuffer | None = None
    phase: PhaseOneResults | None = None
    index: int = 0
    runs_phase: bool = False
    stats: Tensor | None = None
    mix: Tensor | None = None


class _Memory(bytearray):
    """The memory of a cursor: it lives as long as the tensor, and what it points to with it."""

    reads: Reads


class Reads:
    """The reads that graphs make in one forward pass.

    It belongs to the state, and to the cursors that graphs save for their backward: it lives as
    long as either. It holds no tensor that is connected to the graph.

    Args:
        state: Whose sites are read.
    """

    _all: ClassVar[weakref.WeakValueDictionary[int, Reads]] = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, state: TrainingState | CachedState) -> None:
        self._state = weakref.ref(state)
        self._eps = state._residual.eps
        self._first_site = state._residual.sites.start
        self._number = next(self._numbers)
        self._all[self._number] = self
        self._count = 0  # of reads
        self._reads: dict[int, ReadInGraph] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}  # of (query or gain, site)
        self._task = -1

    def cursor(self, count: int = 0) -> Tensor:
        """Where the read after ``count`` others begins: ``[2]``, int64, on the CPU."""
        memory = _Memory(struct.pack("=qq", self._number, count))
        memory.reads = self
        return torch.frombuffer(memory, dtype=torch.int64)

    @classmethod
    def at(cls, cursor: Tensor) -> tuple[Reads, int]:
        """What a cursor points to."""
        number, count = cursor.tolist()
        reads = cls._all.get(number)
        if reads is None:
            raise RuntimeError(
                "attnres: a compiled layer ran backward after its forward pass's state is gone; "
                "hooks of saved tensors that move or copy what a compiled layer saves cannot be "
                "used around it"
            )
        return reads, count

    def state(self) -> TrainingState | CachedState:
        """The state that is read."""
        state = self._state()
        if state is None or backward_pass() != -1:
            raise RuntimeError(f"read: a compiled layer is repeated in the backward. {CHECKPOINTS}")
        return state

    # Forward

    def read(
        self,
        count: int,
        last: Tensor | None,
        delta: Tensor,
        norm_weight: Tensor | None,
        norm_eps: float | None,
        scale: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """``(hidden, sum)`` of the read after ``count`` others."""
        if count < self._count:  # a graph repeats what it checkpoints
            return self._run(self._reads[count], last, delta, norm_weight, norm_eps, scale)
        state = self.state()
        read = self._reads[count] = state.next_in_graph(delta)
        self._count += 1
        hidden, value = self._run(read, last, delta, norm_weight, norm_eps, scale)
        if hidden.dtype != dtype or value.dtype != delta.dtype:
            raise RuntimeError(
                f"read: a compiled layer wrote {delta.dtype} before site {read.site}, to a sum of "
                f"{value.dtype}; what is written between compiled reads must have one dtype"
            )
        if state._residual.closes_block(read.site):
            read.closed, read.buffer = value, GradientBuffer()
        state.after_graph(read, value)
        # A finished block is no graph's: nobody reads what is returned in its place.
        return hidden, value if read.closed is None else torch.empty_like(value)

    def _run(
        self,
        read: ReadInGraph,
        last: Tensor | None,
        delta: Tensor,
        norm_weight: Tensor | None,
        norm_eps: float | None,
        scale: str,
    ) -> tuple[Tensor, Tensor]:
        count = len(read.blocks) + 1
        options = self._options(read, norm_eps, scale)
        # Graphs reuse memory: what is kept or handed on must not be what came in.
        value = delta.clone() if read.begins else None
        partial = None if read.begins else last
        arguments = (
            read.query, read.key_weight, norm_weight, options.eps, options.out_eps, options.scale,
        )  # fmt: skip
        with naming(read.site), below_autograd(False):
            if read.phase is not None:
                out, lse, _ = read.phase.get()
                hidden, summed = _ops.merge_partial.default(
                    out[read.index], lse[read.index], partial,
                    delta if value is None else value, *arguments,
                )  # fmt: skip
                value = summed if value is None else value
            elif value is not None:
                hidden, _, read.stats, read.mix = _ops.depth_attention_with_stats.default(
                    [*read.blocks, value], *arguments, False, *self._saves()
                )
            else:
                hidden, value, read.stats, read.mix = (
                    _ops.accumulate_depth_attention_with_stats.default(
                        partial, delta, read.blocks, *arguments, *self._saves()
                    )
                )
            return (hidden * count if scale == "mix" else hidden), value

    def _saves(self) -> tuple[bool, bool]:
        state = self._state()
        save = "stats" if state is None else state._residual.save
        return save != "nothing", save == "output"

    def _options(self, read: ReadInGraph, norm_eps: float | None, scale: str) -> Options:
        if scale == "eps" and norm_eps is not None:
            norm_eps /= (len(read.blocks) + 1) ** 2
        return Options(self._eps, norm_eps, 1.0, "nothing", False, read.buffers)

    # Backward

    def differentiate(
        self,
        count: int,
        grad_hidden: Tensor | None,
        grad_last: Tensor | None,
        last: Tensor,
        norm_weight: Tensor | None,
        norm_eps: float | None,
        scale: str,
        needs_norm: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the sum (which are those of both its terms) and of the norm's gain.

        Those of blocks, query and key gain are added to what is gathered.
        """
        read = self._reads[count] if keeps_graph() else self._reads.pop(count)
        value = last
        if read.closed is not None:
            value, grad_last = read.closed, read.buffer.take()
        if grad_hidden is None:
            return torch.zeros_like(value) if grad_last is None else grad_last.clone(), None
        if scale == "mix":
            grad_hidden = grad_hidden * (len(read.blocks) + 1)
        options = self._options(read, norm_eps, scale)
        weights = read.query, read.key_weight, norm_weight
        learns = read.key_weight is not None
        wants = [True, learns, learns, needs_norm]
        with naming(read.site, "differentiate"), below_autograd(False):
            if read.phase is not None:
                grad_value, gradients = merge_gradients(
                    read.phase, read.index, value, weights, options, wants, grad_hidden, grad_last,
                )  # fmt: skip
            else:
                saved = (*weights, _some(read.stats), _some(read.mix), value, *read.blocks)
                _, grad_value, gradients = accumulate_gradients(
                    saved, options, [*read.needs, *wants], grad_hidden, grad_last
                )
            grad_query, grad_key_weight, grad_norm = gradients
            if learns:
                self._deposit(read.site, grad_query, grad_key_weight)
            if read.runs_phase:
                self._differentiate_phase(read)
        return grad_value, grad_norm if needs_norm else None

    def _differentiate_phase(self, read: ReadInGraph) -> None:
        """Phase 1's own backward, after that of its last merge."""
        options = Options(self._eps, None, 1.0, "stats", False, read.buffers)
        gradients = read.phase.differentiate(options, [*read.needs, True, True])
        if gradients is not None:
            _, (queries, key_weights) = gradients
            for index, row in enumerate(zip(queries, key_weights, strict=True)):
                self._deposit(read.site - read.index + index, *row)

    def _deposit(self, site: int, *gradients: Tensor) -> None:
        if self._task != backward_pass():
            self._gradients.clear()
            self._task = backward_pass()
        for kind, gradient in enumerate(gradients):
            before = self._gradients.get((kind, site))
            self._gradients[kind, site] = gradient if before is None else before + gradient

    def collected(self, kind: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of all queries (0) or key gains (1) that the module keeps, in this backward
        pass."""
        found = self._gradients if self._task == backward_pass() else {}
        gradients = []
        for site, parameter in enumerate(like, start=self._first_site):
            gradient = found.pop((kind, site), None)
            if gradient is None:
                gradients.append(torch.zeros_like(parameter))
            else:
                # A row of phase 1's is part of a larger result.
                gradients.append(gradient.to(parameter.dtype, copy=gradient._is_view()))
        return gradients


def _some(kept: Tensor | None) -> Tensor | None:
    return kept if kept is not None and kept.numel() else None


# The operators. Autograd and fakes know shapes; whose site it is, they need not know.

_library = torch.library.Library("attnres_residual", "FRAGMENT")
_tags = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None))]


def _define(schema: str):
    """Defines an operator that looks at nothing but its arguments, and the reads they point to."""
    name = _library.define(schema, tags=_tags)

    def implement(function):
        _library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return implement


@_define("sites(Tensor cursor, Tensor[] queries, Tensor[] key_weights) -> Tensor")
def _sites(cursor: Tensor, queries: Sequence[Tensor], key_weights: Sequence[Tensor]) -> Tensor:
    return queries[0].new_zeros(1)


@_define(
    "sites_backward(Tensor gradient, Tensor cursor, Tensor[] queries, Tensor[] key_weights)"
    " -> (Tensor[], Tensor[])"
)
def _sites_backward(gradient, cursor, queries, key_weights):
    reads, _ = Reads.at(cursor)
    return reads.collected(0, queries), reads.collected(1, key_weights)


@_define(
    "read(Tensor cursor, Tensor? ticket, Tensor? last, Tensor delta, Tensor? norm_weight,"
    " float? norm_eps, str scale, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def _read(cursor, ticket, last, delta, norm_weight, norm_eps, scale, dtype):
    reads, count = Reads.at(cursor)
    hidden, value = reads.read(count, last, delta, norm_weight, norm_eps, scale, dtype)
    return hidden, value, reads.cursor(count + 1)


@_define(
    "read_backward(Tensor? grad_hidden, Tensor? grad_last, Tensor cursor, Tensor last,"
    " Tensor? norm_weight, float? norm_eps, str scale, bool needs_norm)"
    " -> (Tensor, Tensor, Tensor)"
)
def _read_backward(
    grad_hidden, grad_last, cursor, last, norm_weight, norm_eps, scale, needs_norm
):  # fmt: skip
    reads, count = Reads.at(cursor)
    grad_value, grad_norm = reads.differentiate(
        count, grad_hidden, grad_last, last, norm_weight, norm_eps, scale, needs_norm
    )
    if grad_norm is None:
        grad_norm = last.new_zeros(norm_weight.shape if needs_norm else 0)
    elif needs_norm:
        grad_norm = grad_norm.to(norm_weight.dtype)
    return grad_value, grad_norm, last.new_zeros(1)


@_define(
    "infer(Tensor cursor, Tensor delta, Tensor? norm_weight, float? norm_eps, str scale,"
    " ScalarType dtype) -> (Tensor, Tensor)"
)
def _infer(cursor, delta, norm_weight, norm_eps, scale, dtype):
    reads, count = Reads.at(cursor)
    hidden = reads.state()._infer_in_graph(delta, norm_weight, norm_eps, scale)
    if hidden.dtype != dtype:
        raise RuntimeError(
            f"read: a compiled layer expected {dtype} and gets {hidden.dtype}; what is written "
            "between compiled reads must have one dtype"
        )
    return hidden, reads.cursor(count + 1)


@torch.library.register_fake("attnres_residual::sites")
def _(cursor, queries, key_weights):
    return queries[0].new_empty(1)


@torch.library.register_fake("attnres_residual::sites_backward")
def _(gradient, cursor, queries, key_weights):
    return [torch.empty_like(t) for t in queries], [torch.empty_like(t) for t in key_weights]


@torch.library.register_fake("attnres_residual::read")
def _(cursor, ticket, last, delta, norm_weight, norm_eps, scale, dtype):
    hidden = delta.new_empty(delta.shape, dtype=dtype)
    return hidden, delta.new_empty(delta.shape), torch.empty_like(cursor)


@torch.library.register_fake("attnres_residual::read_backward")
def _(grad_hidden, grad_last, cursor, last, norm_weight, norm_eps, scale, needs_norm):
    grad_norm = torch.empty_like(norm_weight) if needs_norm else last.new_empty(0)
    return last.new_empty(last.shape), grad_norm, last.new_empty(1)


@torch.library.register_fake("attnres_residual::infer")
def _(cursor, delta, norm_weight, norm_eps, scale, dtype):
    return delta.new_empty(delta.shape, dtype=dtype), torch.empty_like(cursor)


def _setup_sites(ctx, inputs, output) -> None:
    cursor, queries, key_weights = inputs
    ctx.save_for_backward(cursor, *queries, *key_weights)


def _sites_gradients(ctx, gradient):
    cursor, *parameters = ctx.saved_tensors
    half = len(parameters) // 2
    queries, key_weights = torch.ops.attnres_residual.sites_backward.default(
        gradient, cursor, parameters[:half], parameters[half:]
    )
    return None, queries, key_weights


def _setup_read(ctx, inputs, output) -> None:
    cursor, _, _, _, norm_weight, norm_eps, scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(cursor, output[1], norm_weight)
    ctx.norm_eps, ctx.scale = norm_eps, scale


def _read_gradients(ctx, grad_hidden, grad_last, _):
    cursor, last, norm_weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_value, grad_norm, grad_ticket = torch.ops.attnres_residual.read_backward.default(
        grad_hidden, grad_last, cursor, last, norm_weight, ctx.norm_eps, ctx.scale,
        norm_weight is not None and needs[4],
    )  # fmt: skip
    # The sum's gradient is that of both its terms. Of a finished block it is nobody's: the read
    # that closed it takes what was gathered instead.
    candidates = None, grad_ticket, grad_value, grad_value, grad_norm, None, None, None
    return tuple(g if n else None for g, n in zip(candidates, needs, strict=True))


torch.library.register_autograd(
    "attnres_residual::sites", _sites_gradients, setup_context=_setup_sites
)
torch.library.register_autograd(
    "attnres_residual::read", _read_gradients, setup_context=_setup_read
)
