"""A forward pass that has stopped between two sites, as plain tensors, and how it goes on.

A pass cut in two has two autograd graphs. The second begins with leaves; their gradients are what
the first goes backward from. Blocks want care there: sites on both sides of the cut read them, and
a sum of gradients depends on the order in which they are added. Where one process adds those of
later sites first, so do the pieces: what comes from the second piece is where the first one's
gradient buffers begin (:class:`_HandOver`), before any of its own sites adds to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_ext.gradient_buffer import GradientBuffer, can_gather
from attnres_ext.torch_internals import register_pytree_node

if TYPE_CHECKING:
    from attnres_ext.residual import AttentionResiduals

__all__ = ["SuspendedPass", "check_resumable", "describe_sites", "hand_over"]


@dataclass(frozen=True, eq=False)
class SuspendedPass:
    """A forward pass between two sites. :meth:`AttentionResiduals.resume` goes on from it.

    All tensors have the embedding's shape ``[..., D]`` and are on one device.

    Attributes:
        site: The site to read next.
        blocks: Finished blocks, the embedding first; empty in standard mode, and before site 0 is
            read.
        partial: The open block's running sum; None if no sum is open, or all of it is pending.
        pending: What was written and not added yet; None between a read and the write that follows.
    """

    site: int
    blocks: tuple[Tensor, ...]
    partial: Tensor | None
    pending: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: the blocks, the sum if one is open, and what is pending."""
        return tuple(t for t in (*self.blocks, self.partial, self.pending) if t is not None)

    def with_tensors(self, tensors: Sequence[Tensor]) -> SuspendedPass:
        """The same place in a pass with other tensors, in the order of :attr:`tensors`.

        Raises:
            ValueError: If it is another number of tensors.
        """
        if len(tensors) != len(self.tensors):
            raise ValueError(
                f"with_tensors: {len(tensors)} tensors came, expected {len(self.tensors)}: the "
                "blocks, the sum if one is open, and what is pending"
            )
        return _from_tensors(tensors, self.site, len(self.blocks), self.partial is not None)

    def summed(self) -> SuspendedPass:
        """The same with what is pending added to the open sum: one tensor less to send. Bits stay
        as they are, forward and backward."""
        if self.partial is None or self.pending is None:
            return self
        return replace(self, partial=None, pending=self.partial + self.pending)

    def detach(self) -> SuspendedPass:
        """The same tensors as leaves of another graph; they require a gradient where these do."""
        return self.with_tensors([t.detach().requires_grad_(t.requires_grad) for t in self.tensors])

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """The ``grad`` of each of :attr:`tensors`, which are leaves."""
        return tuple(tensor.grad for tensor in self.tensors)

    def backward(self, gradients: Sequence[Tensor | None]) -> None:
        """Goes on backward from here, through the piece that was suspended.

        Args:
            gradients: Of each of :attr:`tensors`, as the piece that went on from them found them;
                None where there is none.

        Raises:
            ValueError: If it is another number of gradients.
        """
        tensors = self.tensors
        if len(gradients) != len(tensors):
            raise ValueError(
                f"backward: {len(gradients)} gradients came, expected {len(tensors)}, one for each "
                "of the tensors"
            )
        pairs = [
            (tensor, gradient)
            for tensor, gradient in zip(tensors, gradients, strict=True)
            if gradient is not None and tensor.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


# Wrappers of modules look for tensors among arguments and results.
register_pytree_node(
    SuspendedPass,
    lambda suspended: (
        list(suspended.tensors),
        (suspended.site, len(suspended.blocks), suspended.partial is not None),
    ),
    lambda tensors, place: _from_tensors(tensors, *place),
)


def _from_tensors(
    tensors: Iterable[Tensor], site: int, num_blocks: int, has_partial: bool
) -> SuspendedPass:
    rest = iter(tensors)
    blocks = tuple(islice(rest, num_blocks))
    partial = next(rest) if has_partial else None
    return SuspendedPass(site, blocks, partial, next(rest, None))


class _HandOver(torch.autograd.Function):
    """``apply(buffers, *tensors)`` -> the same in value.

    In the backward it comes before all that the tensors were made of: gradients of those with a
    buffer begin there.
    """

    @staticmethod
    def forward(
        ctx, buffers: Sequence[GradientBuffer | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.buffers = buffers
        # No views of autograd's: whoever sends them may detach them in place.
        outputs = tuple(tensor.detach() for tensor in tensors)
        needs = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(t for t, n in zip(outputs, needs, strict=True) if not n))
        return outputs

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        returned = list(gradients)
        for index, buffer in enumerate(ctx.buffers):
            if buffer is not None and returned[index] is not None:
                buffer.deposit(returned[index])
                returned[index] = None
        return None, *returned


def hand_over(
    suspended: SuspendedPass, buffers: Sequence[GradientBuffer | None], last: Tensor | None
) -> SuspendedPass:
    """The same in value; gradients that come back for a block go into its buffer.

    Args:
        suspended: Where the pass stops.
        buffers: Of each of its blocks.
        last: In the backward this, too, comes after the result: what compiled reads go by.
    """
    tensors = suspended.tensors
    if not can_gather() or not any(tensor.requires_grad for tensor in tensors):
        return suspended
    anchors = () if last is None else (last,)
    return suspended.with_tensors(_HandOver.apply(buffers, *tensors, *anchors)[: len(tensors)])


def describe_sites(sites: range) -> str:
    """For messages: the first and the last."""
    return f"{sites[0]} to {sites[-1]}" if sites else "none"


def check_resumable(residual: AttentionResiduals, suspended: SuspendedPass) -> None:
    """Raises unless ``residual`` can go on from ``suspended``.

    Raises:
        TypeError: If it is no suspended pass.
        ValueError: If the module does not keep its site, or it does not have the tensors that a
            pass has there.
    """
    if not isinstance(suspended, SuspendedPass):
        kind = type(suspended).__name__
        raise TypeError(f"resume: suspended is a {kind}, expected what a state's suspend returns")
    site, own = suspended.site, residual.sites
    if not own.start <= site < own.stop:
        raise ValueError(
            f"resume: suspended is at site {site}, expected one that this module keeps, "
            f"{describe_sites(own)}"
        )
    count = residual.num_blocks_before(site)
    if len(suspended.blocks) != count:
        raise ValueError(
            f"resume: suspended has {len(suspended.blocks)} finished blocks, expected {count} "
            f"before site {site}"
        )
    has_partial = residual.has_partial_before(site)
    if suspended.partial is not None and not has_partial:
        raise ValueError(f"resume: suspended has an open sum, expected none before site {site}")
    if suspended.partial is None and suspended.pending is None and (has_partial or site == 0):
        wanted = "a sum" if has_partial else "the embedding"
        raise ValueError(
            f"resume: suspended has neither partial nor pending, expected {wanted} before site "
            f"{site}"
        )
    _check_tensors(residual.hidden_size, suspended)


def _check_tensors(hidden_size: int, suspended: SuspendedPass) -> None:
    named = [(f"blocks[{index}]", block) for index, block in enumerate(suspended.blocks)]
    named += [("partial", suspended.partial), ("pending", suspended.pending)]
    named = [(name, tensor) for name, tensor in named if tensor is not None]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"resume: {name} is a {type(tensor).__name__}, expected a tensor")
    first = named[0][1]
    for name, tensor in named:
        shape = tuple(tensor.shape)
        if tensor.dim() < 1 or shape[-1] != hidden_size:
            raise ValueError(f"resume: {name} has shape {shape}, expected [..., {hidden_size}]")
        if tensor.shape != first.shape:
            raise ValueError(
                f"resume: {name} has shape {shape}, expected {tuple(first.shape)} as {named[0][0]}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"resume: {name} is on {tensor.device}, expected {first.device} as {named[0][0]}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"resume: {name} has dtype {tensor.dtype}, expected a floating point dtype"
            )
