"""Refuses second derivatives.

The compiled operators differentiate once. A gradient made with ``create_graph=True`` would look
like a constant to whoever differentiates it, and leave terms out of the result without a word; what
passes through here raises instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["first_order_only", "refuse_second_derivative"]


class _Refusal(torch.autograd.Function):
    """Identity that makes its result depend on ``anchors``, so that differentiating it raises."""

    @staticmethod
    def forward(ctx, gradient, *anchors):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, gradient):
        raise_second_derivative()


def raise_second_derivative(*_) -> None:
    """Says that there is no second derivative."""
    raise RuntimeError(
        "attnres: second derivatives are not supported by the compiled operators; differentiate "
        "once, without create_graph=True, or use the definitions in attnres_ext.reference"
    )


def refuse_second_derivative(gradient: Tensor, of: Sequence[Tensor | None]) -> Tensor:
    """``gradient``, which raises when it is differentiated with respect to any of the tensors
    ``of``."""
    anchors = [tensor for tensor in of if tensor is not None and tensor.requires_grad]
    return _Refusal.apply(gradient, *anchors) if anchors else gradient


def first_order_only(backward: Callable) -> Callable:
    """Runs the backward of an ``autograd.Function`` without a graph, and refuses to differentiate
    its results."""

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        anchors = (*ctx.saved_tensors, *gradients)
        return tuple(
            refuse_second_derivative(result, anchors) if isinstance(result, Tensor) else result
            for result in results
        )

    return wrapped
