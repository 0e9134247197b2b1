"""Phase 1 of one block, during a forward pass and its backward.

All sites of a block read its finished blocks at once (paper, Algorithm 1); each then merges its row
of the results with the block's running sum. In the backward, each site's merge writes the gradient
of its row where phase 1's own backward reads it, and that runs once, after the last of them:
nothing is stacked, copied or added.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_ext import ops, side_stream
from attnres_ext.autograd import (
    Options,
    below_autograd,
    inter_block_gradients,
    like,
    wanted,
)
from attnres_ext.first_order import first_order_only
from attnres_ext.gradient_buffer import GradientBuffer
from attnres_ext.recomputation import keep, unseen
from attnres_ext.reference import compute_dtype
from attnres_ext.side_stream import follow
from attnres_ext.torch_internals import backward_pass

if TYPE_CHECKING:
    from attnres_ext.residual_state import Reading

__all__ = ["FunctionalPhaseOne", "GatheringPhaseOne", "PhaseOneResults", "merge_gradients"]

_ops = torch.ops.attnres


class FunctionalPhaseOne:
    """Phase 1 through the functional API: for tracing, function transforms, and without
    gradients."""

    def __init__(
        self, blocks: Sequence[Tensor], queries: Tensor, key_weights: Tensor, eps: float
    ) -> None:
        out, lse = ops.inter_block_attention(blocks, queries, key_weights, eps=eps)
        self._eps = eps
        self._rows = list(zip(out.unbind(0), lse.unbind(0), strict=True))

    def merge(
        self, index: int, partial: Tensor | None, delta: Tensor, reading: Reading
    ) -> tuple[Tensor, Tensor]:
        """``(hidden, new_partial)`` of the block's site ``index``."""
        return ops.merge_partial(*self._rows[index], partial, delta, **reading, eps=self._eps)


class GatheringPhaseOne:
    """Phase 1 whose output gradients gather in one tensor ``[S, ..., D]``.

    Args:
        results: What phase 1 finds.
        token: Connects merges to phase 1's node in the graph; a tensor of no elements.
    """

    def __init__(self, results: PhaseOneResults, token: Tensor) -> None:
        self.results = results
        self.token = token

    @classmethod
    def over(
        cls,
        blocks: Sequence[Tensor],
        buffers: Sequence[GradientBuffer | None],
        queries: Tensor,
        key_weights: Tensor,
        eps: float,
    ) -> GatheringPhaseOne:
        """Runs phase 1 over ``N`` blocks ``[..., D]`` for queries and key gains ``[S, D]``.

        Gradients of blocks go into ``buffers``, where there are any.
        """
        results = PhaseOneResults(blocks, queries, key_weights, eps)
        options = Options(eps, None, 1.0, "stats", False, buffers)
        # The node owns the results: they live until phase 1's backward has run, which is after that
        # of every merge. What else it saves are the blocks, which stay in memory anyway.
        with keep(results):
            token = _PhaseOne.apply(options, weakref.ref(results), queries, key_weights, *blocks)
        return cls(results, token)

    @classmethod
    def again(cls, results: PhaseOneResults) -> GatheringPhaseOne:
        """For reads that are repeated: the results are there, or computed when they are needed."""
        with unseen():
            token = torch.empty(0, dtype=torch.float32, device="cpu")
        return cls(results, token.requires_grad_(results.needs_gradient))

    def merge(
        self, index: int, partial: Tensor | None, delta: Tensor, reading: Reading
    ) -> tuple[Tensor, Tensor]:
        """``(hidden, new_partial)`` of the block's site ``index``."""
        results = self.results
        options = Options(results.eps, reading["out_eps"], 1.0, "nothing", False, None)
        weights = reading["query"], reading["key_weight"], reading["out_weight"]
        # Without a node of its own, phase 1 has no owner but its merges.
        owner = weakref.ref(results) if self.token.requires_grad else lambda: results
        return _Merge.apply(options, owner, index, self.token, *weights, partial, delta)


class PhaseOneResults:
    """What phase 1 finds for all sites of a block, and the gradients that their merges have for it.

    Results can be computed again from the blocks, so they need not be kept from the forward to the
    backward: :meth:`drop` them, and the first merge that runs backward brings them back for all.

    None of this travels along autograd's edges, so streams that work on it are made to follow one
    another here.
    """

    def __init__(
        self, blocks: Sequence[Tensor], queries: Tensor, key_weights: Tensor, eps: float
    ) -> None:
        self.needs_gradient = any(t.requires_grad for t in (queries, key_weights, *blocks))
        # Detached: the node that owns this must not be reachable from here.
        self._inputs = [block.detach() for block in blocks], queries.detach(), key_weights.detach()
        self.eps = eps
        self._results: tuple[Tensor, Tensor, Tensor] | None = None
        self._known = False  # whether results have been computed before
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._written: set[int] = set()
        self._task = -1
        self._stream: torch.cuda.Stream | None = None

    def get(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(out [S, ..., D], lse [S, ...], statistics)``, for the current stream; computed if they
        are not there."""
        self._follow()
        if self._results is None:
            blocks, queries, key_weights = self._inputs
            with below_autograd(False), unseen() if self._known else nullcontext():
                self._results = _ops.inter_block_attention_with_stats.default(
                    blocks, queries, key_weights, self.eps, 1.0
                )
            self._known = True
        return self._results

    def drop(self) -> None:
        """Forgets the results."""
        self._results = None

    def gradient_rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Where the merge of site ``index``, which has got the results, writes the gradients of its
        rows of ``out`` and ``lse``."""
        task = backward_pass()
        if self._gradients is None or self._task != task:
            out, lse, _ = self.get()
            self._gradients = torch.empty_like(out), torch.empty_like(lse)
            self._written.clear()
            self._task = task
        self._written.add(index)
        return self._gradients[0][index], self._gradients[1][index]

    def differentiate(
        self, options: Options, needs: Sequence[bool], inputs: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor | None], list[Tensor | None]] | None:
        """Gradients of the blocks, and of queries and key gains, once all merges have run backward;
        None if none of them has.

        Args:
            options: Where blocks' gradients go.
            needs: For each block, then for queries and key gains.
            inputs: Queries, key gains and blocks as autograd saved them.
        """
        gradients = self.take_gradients()
        if gradients is None:
            return None
        blocks, queries, key_weights = self._inputs
        if inputs is not None:
            queries, key_weights, *blocks = inputs
        saved = (queries, key_weights, self.get()[2], *blocks)
        self.drop()
        with below_autograd(False):
            return inter_block_gradients(saved, options, list(needs), *gradients)

    def take_gradients(self) -> tuple[Tensor, Tensor] | None:
        """The gradients that this backward pass collected, zero for sites it did not visit; None
        without any."""
        self._follow()
        gradients, self._gradients = self._gradients, None
        if gradients is None or self._task != backward_pass():
            return None
        for index in set(range(len(gradients[0]))) - self._written:
            for gradient in gradients:
                gradient[index].zero_()
        return gradients

    def _follow(self) -> None:
        """What the current stream is given from here on runs after what was done here before."""
        last, self._stream = self._stream, side_stream.current_stream(self._inputs[1].device)
        follow(self._stream, last, (*(self._results or ()), *(self._gradients or ())))


class _PhaseOne(torch.autograd.Function):
    """``apply(options, results, queries, key_weights, *blocks)`` -> a tensor of no elements: merges
    take it, so that the engine runs this node after theirs."""

    @staticmethod
    def forward(ctx, options, results, queries, key_weights, *blocks):
        results().get()
        # Merges return no gradient for the token: the incoming one is None, not zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, key_weights, *blocks)
        ctx.results, ctx.options = results, options
        return queries.new_empty(0)

    @staticmethod
    @first_order_only
    def backward(ctx, _):
        needs = ctx.needs_input_grad
        gradients = ctx.results().differentiate(
            ctx.options, [*needs[4:], *needs[2:4]], ctx.saved_tensors
        )
        if gradients is None:
            return (None,) * len(needs)
        blocks, weights = gradients
        return None, None, *weights, *blocks


class _Merge(torch.autograd.Function):
    """``apply(options, results, index, token, query, key_weight, out_weight, partial, delta)`` ->
    ``(hidden, new_partial)``."""

    @staticmethod
    def forward(ctx, options, results, index, token, query, key_weight, out_weight, partial, delta):
        out, lse, _ = results().get()
        with below_autograd(False):
            hidden, value = _ops.merge_partial.default(
                out[index], lse[index], partial, delta, query, key_weight, out_weight,
                options.eps, options.out_eps, options.scale,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        if partial is None:
            value = delta
        ctx.save_for_backward(value, query, key_weight, out_weight)
        ctx.options, ctx.results, ctx.index = options, results, index
        ctx.dtypes = None if partial is None else partial.dtype, delta.dtype
        # The first delta is the sum, and its gradient as the sum's is added in the kernel.
        return hidden, delta.view_as(delta) if partial is None else value

    @staticmethod
    @first_order_only
    def backward(ctx, grad_hidden, grad_value):
        needs = ctx.needs_input_grad
        weights = [None] * 3
        if grad_hidden is not None:
            value, query, key_weight, out_weight = ctx.saved_tensors
            options, results, index = ctx.options, ctx.results(), ctx.index
            if results is None:
                raise RuntimeError(
                    "attnres: phase 1 has run backward and its graph is freed; to go through it "
                    "again, pass retain_graph=True the first time"
                )
            wants = [needs[7] or needs[8], *needs[4:7]]
            saved = query, key_weight, out_weight
            grad_value, weights = merge_gradients(
                results, index, value, saved, options, wants, grad_hidden, grad_value, needs[3]
            )
        # The sum's gradient is that of both its terms: one tensor, handed out twice.
        terms = [
            like(grad_value, dtype, need) for dtype, need in zip(ctx.dtypes, needs[7:], strict=True)
        ]
        return None, None, None, None, *weights, *terms


def merge_gradients(
    results: PhaseOneResults,
    index: int,
    value: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    wants: Sequence[bool],
    grad_hidden: Tensor,
    grad_value: Tensor | None,
    learns_phase: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of what was merged at site ``index``, and of query, key gain and output gain;
    those of phase 1's rows go into ``results``.

    Args:
        results: Phase 1's.
        index: Which of its rows.
        value: ``[..., D]``, the sum that was merged.
        weights: Query, key gain and output gain.
        options: Epsilons of keys and output.
        wants: Which gradients are needed: of the sum and of each of the weights.
        grad_hidden: Of the merge's result.
        grad_value: Of the sum, from elsewhere.
        learns_phase: Whether phase 1 needs gradients.
    """
    out, lse, _ = results.get()
    arguments = (
        grad_hidden, grad_value, out[index], lse[index], value, *weights,
        options.eps, options.out_eps, options.scale,
    )  # fmt: skip
    if learns_phase:
        grad_out, grad_lse = results.gradient_rows(index)
        dtype = compute_dtype([out, value])
        written = grad_lse if dtype == lse.dtype else grad_lse.to(dtype)
        with below_autograd(False):
            grad_value, *gradients = _ops.merge_partial_backward_.default(
                *arguments, wants, grad_out, written
            )
        if written is not grad_lse:
            grad_lse.copy_(written)
    else:
        with below_autograd(False):
            _, _, grad_value, *gradients = _ops.merge_partial_backward.default(
                *arguments, [False, False, *wants]
            )
    return grad_value, wanted(gradients, wants[1:])
