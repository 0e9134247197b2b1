"""One call of every operator, forward and backward, on tensors of a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnres_ext import ops
from tests.ops.cases import make_sources, make_weights

Call = Callable[[dict[str, Any]], tuple[Tensor, ...]]


def make_arguments(
    device: str, rows: int = 300, hidden: int = 256, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """What every call below takes: four sources, a query and gains."""
    sources = make_sources(4, (rows, hidden), dtype=dtype, device=device)
    return {"sources": sources, **make_weights(hidden, device=device)}


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    """Every tensor of the arguments, sources first."""
    return [*arguments["sources"], *(v for v in arguments.values() if isinstance(v, Tensor))]


def refill(arguments: dict[str, Any], values: dict[str, Any]) -> None:
    """Copies values into the tensors of the arguments, which stay where they are."""
    with torch.no_grad():
        for tensor, value in zip(tensors_of(arguments), tensors_of(values), strict=True):
            tensor.copy_(value)


def depth_attention(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return ops.depth_attention(
        a["sources"],
        a["query"],
        a["key_weight"],
        out_weight=a["out_weight"],
        return_weights=True,
    )


def accumulate(a: dict[str, Any]) -> tuple[Tensor, ...]:
    partial, delta, *blocks = a["sources"]
    return ops.accumulate_depth_attention(
        partial, delta, blocks, a["query"], a["key_weight"], out_weight=a["out_weight"]
    )


def inter_block(a: dict[str, Any]) -> tuple[Tensor, ...]:
    queries = torch.stack([a["query"], -a["query"], 2 * a["query"]])
    return ops.inter_block_attention(a["sources"], queries, a["key_weight"].expand(3, -1))


def merge(a: dict[str, Any]) -> tuple[Tensor, ...]:
    partial, delta, out, other = a["sources"]
    return ops.merge_partial(
        out,
        other[..., 0].float(),
        partial,
        delta,
        a["query"],
        a["key_weight"],
        out_weight=a["out_weight"],
    )


CALLS: dict[str, Call] = {
    "depth_attention": depth_attention,
    "accumulate_depth_attention": accumulate,
    "inter_block_attention": inter_block,
    "merge_partial": merge,
}


def forward(call: Call) -> Call:
    """The call without gradients."""

    def run(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(arguments)

    return run


def forward_and_backward(call: Call) -> Call:
    """The call, and the gradient of the sum of its outputs for every tensor."""

    def run(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        leaves = tensors_of(arguments)
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = call(arguments)
        gradients = torch.autograd.grad(
            outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True
        )
        found = [gradient for gradient in gradients if gradient is not None]
        return (*(out.detach() for out in outputs), *found)

    return run


DIRECTIONS = {"forward": forward, "forward-backward": forward_and_backward}
