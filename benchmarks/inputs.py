"""Tensors for a case, and the same call for every baseline that has our functions' signatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .registry import Case

EPS = 1e-5


@dataclass
class Inputs:
    """Arguments of one call; what an operator does not take is None.

    ``sources`` are ``[M, D]`` each (the blocks, where there are blocks), ``query`` and
    ``key_weight`` ``[D]`` or ``[S, D]``, ``out`` ``[M, D]`` and ``lse`` ``[M]`` what phase 1 left,
    ``upstream`` one incoming gradient per output.
    """

    sources: list[Tensor]
    query: Tensor
    key_weight: Tensor
    out_weight: Tensor | None = None
    partial: Tensor | None = None
    delta: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    upstream: tuple[Tensor, ...] = ()

    # What `arguments` made of it, so that building them is not timed with every call.
    _bound: tuple[tuple[Any, ...], dict[str, Any]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that can have a gradient, by name."""
        named = {f"sources[{i}]": source for i, source in enumerate(self.sources)}
        for name in ("partial", "delta", "out", "lse", "query", "key_weight", "out_weight"):
            if getattr(self, name) is not None:
                named[name] = getattr(self, name)
        return named

    def forget_gradients(self) -> None:
        """Drops the gradients of what a single site reads."""
        for name in _READ_ONCE:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.grad = None

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Inputs:
        """A copy with ``function(name, tensor)`` in the place of every tensor."""
        changed: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.init):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changed[name] = function(name, value)
            elif value is not None:
                changed[name] = type(value)(function(name, v) for v in value)
        return replace(self, **changed)


#: Tensors that all tokens share; their gradients sum over all tokens.
WEIGHTS = ("query", "key_weight", "out_weight")
#: Tensors that a single site reads: nothing has left a gradient for them before.
_READ_ONCE = ("partial", "delta", "out", "lse")
#: Tensors with a row per token.
_ROWS = ("sources", *_READ_ONCE)


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random inputs whose logits have a standard deviation of about 1.

    Sources differ in size, as the outputs of shallow and deep layers do. Inputs require gradients
    where the case records a graph. Where it accumulates, blocks and weights, which many sites read,
    have a `.grad` already.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    dtype = getattr(torch, case.dtype)

    def rows(size: float, dtype: torch.dtype = dtype) -> Tensor:
        width = case.hidden + (64 if case.layout == "padded" else 0)
        values = randn(case.tokens, width).mul_(size).to(dtype)
        return values[:, : case.hidden]

    def weight(mean: float, deviation: float) -> Tensor:
        shape = (
            (case.queries, case.hidden)
            if case.operator == "inter_block_attention"
            else (case.hidden,)
        )
        return randn(*shape).mul_(deviation).add_(mean)

    inputs = Inputs(
        sources=[rows(0.5 + i % 4) for i in range(case.sources)],
        query=weight(0.0, case.hidden**-0.5),
        key_weight=weight(1.0, 0.1),
        out_weight=weight(1.0, 0.1) if case.norm else None,
    )
    if case.operator in ("accumulate_depth_attention", "merge_partial"):
        inputs.partial, inputs.delta = rows(2.0), rows(1.0)
    if case.operator == "merge_partial":
        inputs.sources = []
        inputs.out = rows(1.0)
        inputs.lse = randn(case.tokens).add_(2.0)
    if case.has_backward:
        inputs.upstream = _upstream(case, rows, randn)
    if case.gradients != "none":
        for name, leaf in inputs.leaves().items():
            leaf.requires_grad_()
            if case.gradients == "accumulate" and name not in _READ_ONCE:
                leaf.grad = randn(*leaf.shape).to(leaf.dtype)
    return inputs


def _upstream(
    case: Case, rows: Callable[[float], Tensor], randn: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    if case.operator == "depth_attention":
        return (rows(1.0),)
    if case.operator == "inter_block_attention":
        out = torch.stack([rows(1.0) for _ in range(case.queries)])
        return (out, randn(case.queries, case.tokens))
    return (rows(1.0), rows(1.0))


def map_leaves(inputs: Inputs, function: Callable[[str, Tensor], Tensor]) -> Inputs:
    """``inputs.map``, applied to each tensor's `.grad` as well; the results are leaves again."""

    def leaf(name: str, tensor: Tensor) -> Tensor:
        made = function(name, tensor.detach()).requires_grad_(tensor.requires_grad)
        if tensor.grad is not None:
            made.grad = function(name, tensor.grad)
        return made

    return inputs.map(leaf)


def copy_inputs(inputs: Inputs) -> Inputs:
    """The same values elsewhere in memory, strides, gradients and all."""

    def copy(_: str, tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return made.copy_(tensor)

    return map_leaves(inputs, copy)


def with_weights(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """The same inputs with weights in another dtype; everything else stays where it is."""
    if dtype is None:
        return inputs
    return map_leaves(inputs, lambda name, tensor: tensor.to(dtype) if name in WEIGHTS else tensor)


def take_rows(inputs: Inputs, rows: Tensor) -> Inputs:
    """Copies of the inputs of the tokens ``rows``; weights stay whole."""

    def part(name: str, tensor: Tensor) -> Tensor:
        if name == "upstream":
            # Outputs of phase 1 have the queries in front of the tokens; others start with tokens.
            return tensor.index_select(1 if inputs.query.dim() == 2 else 0, rows)
        return tensor.index_select(0, rows) if name in _ROWS else tensor.clone()

    return map_leaves(inputs, part)


def arguments(case: Case, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the public function ``case.operator``."""
    if inputs._bound is None:
        inputs._bound = _arguments(case, inputs)
    return inputs._bound


def _arguments(case: Case, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weights = (inputs.query, inputs.key_weight)
    if case.operator == "inter_block_attention":
        return (inputs.sources, *weights), {"eps": EPS}
    keywords = {"out_weight": inputs.out_weight, "eps": EPS}
    if case.operator == "depth_attention":
        return (inputs.sources, *weights), keywords
    if case.operator == "accumulate_depth_attention":
        return (inputs.partial, inputs.delta, inputs.sources, *weights), keywords
    return (inputs.out, inputs.lse, inputs.partial, inputs.delta, *weights), keywords


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results of an operator, one or many."""
    return result if isinstance(result, tuple) else (result,)
