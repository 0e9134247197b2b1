"""One gradient buffer per block, filled by the kernels of every site that reads the block.

A block is read by every later site, and each read has a gradient for it. Left to autograd, those
gradients are materialised and added pairwise: three full-size transfers per block and site, more
than the backward itself moves. Instead a block passes through :func:`tap`, an identity; the
operators that read it add their gradients into the tap's :class:`GradientBuffer` inside their own
kernels and return none; and the tap, which autograd runs after the block's last reader, hands the
buffer on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnres_ext import side_stream
from attnres_ext.first_order import refuse_second_derivative
from attnres_ext.recomputation import keep
from attnres_ext.side_stream import follow
from attnres_ext.torch_internals import backward_pass, is_transformed, may_have_hooks

__all__ = ["GradientBuffer", "after", "can_gather", "can_tap", "tap", "tap_all", "tap_with_end"]


class GradientBuffer:
    """The gradient of one tapped tensor while a backward pass collects it.

    A deposit belongs to the backward pass (autograd calls it a graph task) that made it. What an
    aborted pass left behind, or a pass that never reached the tap because its gradient was not
    asked for, is dropped when the next one begins. One graph takes one backward pass at a time.

    Deposits do not travel along autograd's edges, so the buffer itself sees to it that streams
    which deposit, and the one that takes, follow one another.
    """

    __slots__ = ("_gradient", "_stream", "_task")

    def __init__(self) -> None:
        self._gradient: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._task = -1

    def slot(self, like: Tensor, stream: torch.cuda.Stream | None = None) -> tuple[Tensor, bool]:
        """The tensor to write a gradient of ``like`` into, and whether to add to what it holds.

        Call it in a backward, and write before the next call.

        Args:
            like: What the gradient is one of.
            stream: The current one, on which it is written; None where a device has none.

        Returns:
            ``(gradient, accumulate)``: contiguous, of the shape, dtype and device of ``like``. The
            first call of a backward pass gets uninitialised memory and ``False``.
        """
        task, last = backward_pass(), self._stream
        self._stream = stream
        if self._gradient is not None and self._task == task:
            follow(stream, last, (self._gradient,))
            return self._gradient, True
        self._gradient = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._task = task
        return self._gradient, False

    def deposit(self, gradient: Tensor) -> None:
        """Adds a gradient that no kernel of ours writes; it stays the caller's."""
        collected, add = self.slot(gradient, side_stream.current_stream(gradient.device))
        with torch.no_grad():
            collected.add_(gradient) if add else collected.copy_(gradient)

    def take(self) -> Tensor | None:
        """The gradient that this backward pass collected, for the current stream, or None; the
        buffer is empty afterwards."""
        gradient, last, task = self._gradient, self._stream, self._task
        self._gradient, self._stream, self._task = None, None, -1
        if gradient is None or task != backward_pass():
            return None
        follow(side_stream.current_stream(gradient.device), last, (gradient,))
        return gradient


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffers: Sequence[GradientBuffer], *tensors: Tensor) -> tuple[Tensor, ...]:
        # No reader but our operators: the incoming gradient is None, not zeros.
        ctx.set_materialize_grads(False)
        ctx.buffers = buffers
        ctx.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in (*tensors, tensors[-1]))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        returned = []
        for buffer, gradient in zip(ctx.buffers, gradients[:-1], strict=True):
            collected = buffer.take()
            if collected is not None:
                with torch.no_grad():
                    if gradient is not None:  # readers that know nothing of the buffer
                        collected.add_(gradient)
                gradient = refuse_second_derivative(collected, ctx.saved_tensors)
            returned.append(gradient)
        return None, *returned


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, earlier: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return gradient, None


def after(tensor: Tensor, earlier: Tensor) -> Tensor:
    """``tensor`` itself; in the backward it comes before whatever made ``earlier``."""
    return _After.apply(tensor, earlier)


def tap(tensor: Tensor, buffer: GradientBuffer) -> Tensor:
    """``tensor`` itself in value; in the backward, its gradient plus whatever ``buffer``
    collected."""
    return tap_with_end(tensor, buffer)[0]


def tap_with_end(tensor: Tensor, buffer: GradientBuffer) -> tuple[Tensor, Tensor]:
    """:func:`tap`, and the same in value once more, for readers that add to ``buffer`` alone: the
    tap comes after them, and takes no gradient from them."""
    (tapped,), end = tap_all([tensor], [buffer])
    return tapped, end


def tap_all(
    tensors: Sequence[Tensor], buffers: Sequence[GradientBuffer]
) -> tuple[list[Tensor], Tensor]:
    """:func:`tap_with_end` for several tensors, whose gradients are handed on together; the end is
    that of all."""
    # Kept as they are under a checkpoint too: blocks stay in memory anyway, and recomputation does
    # not come by here again.
    with keep(None):
        *tapped, end = _Tap.apply(buffers, *tensors)
    return tapped, end


def can_tap(tensor: Tensor) -> bool:
    """Whether gradients of ``tensor`` can go through a buffer."""
    return tensor.requires_grad and can_gather()


def can_gather() -> bool:
    """Whether gradients can gather in buffers.

    Not without gradients; nor under ``torch.compile``, ``torch.func`` and forward-mode
    differentiation, which see functions and no side effects; nor where nodes must not be told how
    to save. There autograd adds.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and may_have_hooks()
    )
