"""How the operators run on ``DTensor``: each rank on its own tokens, and nothing is sent.

Depth attention looks at one token at a time. So what is laid out like tokens may be sharded along
any dimension of them, on any dimension of a mesh, and results are sharded alike. Queries and gains
are the same for all tokens: replicated, and their gradients are partial sums. What would need
communication is an error, so that none happens behind anybody's back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from attnres_ext import ops  # noqa: F401  (the operators must exist before their rules)

__all__ = ["register"]

# How a tensor lies: like the tokens [..., D]; as rows of them [S, ..., D] or [S, ...]; a vector,
# the same for all tokens; or a vector's gradient, a part of it on each rank.
_TOKENS, _ROWS, _VECTOR, _SUM = "tokens", "rows", "vector", "sum"

#: Arguments by name, in all operators; `out` is phase 1's, and a row that was taken out of it.
_ARGUMENTS = {
    **dict.fromkeys(("sources", "blocks", "partial", "delta", "new_partial", "value"), _TOKENS),
    **dict.fromkeys(("grad_sources", "grad_blocks", "grad_hidden", "grad_new_partial"), _TOKENS),
    **dict.fromkeys(("mix", "out", "lse"), _TOKENS),
    **dict.fromkeys(("stats", "grad_weights"), _ROWS),
    **dict.fromkeys(("query", "queries", "key_weight", "key_weights", "out_weight"), _VECTOR),
}
_WEIGHTS = (_SUM, _SUM, _SUM)
#: Results of each operator; a list has one word for all of its tensors.
_RESULTS = {
    "depth_attention": (_TOKENS,),
    "depth_attention_with_stats": (_TOKENS, _ROWS, _ROWS, _TOKENS),
    "depth_attention_backward": (_TOKENS, *_WEIGHTS),
    "depth_attention_backward_": _WEIGHTS,
    "accumulate_depth_attention": (_TOKENS, _TOKENS),
    "accumulate_depth_attention_with_stats": (_TOKENS, _TOKENS, _ROWS, _TOKENS),
    "accumulate_depth_attention_backward": (_TOKENS, _TOKENS, *_WEIGHTS),
    "accumulate_depth_attention_backward_": (_TOKENS, *_WEIGHTS),
    "inter_block_attention": (_ROWS, _ROWS),
    "inter_block_attention_with_stats": (_ROWS, _ROWS, _ROWS),
    "inter_block_attention_backward": (_TOKENS, _SUM, _SUM),
    "inter_block_attention_backward_": (_SUM, _SUM),
    "merge_partial": (_TOKENS, _TOKENS),
    "merge_partial_backward": (_TOKENS, _TOKENS, _TOKENS, *_WEIGHTS),
    "merge_partial_backward_": (_TOKENS, *_WEIGHTS),
}
_IN_PLACE = ("block_cache_write", "block_cache_attend", "block_cache_inter", "block_cache_merge")


@cache
def register() -> None:
    """Gives every operator its rule; again does nothing."""
    for name in _RESULTS:
        torch.library.register_torch_dispatch(f"attnres::{name}", DTensor, partial(_run, name))
    for name in _IN_PLACE:
        torch.library.register_torch_dispatch(f"attnres::{name}", DTensor, partial(_refuse, name))


def _refuse(name: str, *_: Any) -> None:
    raise RuntimeError(
        f"{name}: a block cache takes no DTensor; attnres_ext.parallel.SequenceParallel shards one "
        "along the sequence"
    )


def _run(name: str, cls: type, func: Any, types: Any, args: Sequence, kwargs: dict) -> Any:
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    kinds = {**_ARGUMENTS, "grad_out": _TOKENS}
    if name.startswith("inter_block"):  # the gradients of all rows at once
        kinds.update(grad_out=_ROWS, grad_lse=_ROWS)
    elif name.startswith("merge"):
        kinds.update(grad_lse=_TOKENS)
    layout = _Layout.of(name, named, kinds)
    with torch.no_grad():  # autograd is above
        local = {key: layout.local(key, value, kinds.get(key)) for key, value in named.items()}
        results = func(**local)
        single = isinstance(results, Tensor)
        whole = [
            layout.whole(result, kind)
            for result, kind in zip((results,) if single else results, _RESULTS[name], strict=True)
        ]
    return whole[0] if single else tuple(whole)


class _Layout:
    """How the tokens of one call lie on a mesh.

    Args:
        name: The operator.
        mesh: Where.
        placements: One for each dimension of the mesh: replicated, or a dimension of the tokens.
        sizes: Of the tokens' dimensions, on all ranks together.
    """

    def __init__(
        self, name: str, mesh: DeviceMesh, placements: Sequence[Placement], sizes: Sequence[int]
    ) -> None:
        self._name, self._mesh = name, mesh
        self._placements, self._sizes = tuple(placements), tuple(sizes)

    @classmethod
    def of(cls, name: str, named: dict[str, Any], kinds: dict[str, str]) -> _Layout:
        """The layout that the first tensor has that is laid out like tokens."""
        for key, value in named.items():
            if kinds.get(key) is not _TOKENS or key == "lse":
                continue
            for label, tensor in _labelled(key, value):
                if not isinstance(tensor, DTensor):
                    raise RuntimeError(
                        f"{name}: {label} is a plain tensor, expected a DTensor as other arguments "
                        "are"
                    )
                for placement in tensor.placements:
                    cls._check_token_placement(name, label, tensor, placement)
                return cls(name, tensor.device_mesh, tensor.placements, tensor.shape[:-1])
        raise RuntimeError(f"{name}: no argument is laid out like tokens")

    @staticmethod
    def _check_token_placement(
        name: str, label: str, tensor: DTensor, placement: Placement
    ) -> None:
        last = tensor.dim() - 1
        if placement.is_partial():
            raise RuntimeError(
                f"{name}: {label} has placements {tensor.placements}, expected no partial sum: "
                "redistribute it to Shard or Replicate, which is the reduction"
            )
        # Among shards there is one more kind, which torch makes for itself.
        if not placement.is_replicate() and not (
            isinstance(placement, Shard) and placement.dim >= 0
        ):
            raise RuntimeError(
                f"{name}: {label} has placements {tensor.placements}, expected Shard or Replicate"
            )
        if isinstance(placement, Shard) and placement.dim == last:
            raise RuntimeError(
                f"{name}: {label} has placements {tensor.placements}, sharded along D, its last "
                "dimension; logits are sums over D: redistribute it to a shard of tokens"
            )

    def local(self, key: str, value: Any, kind: str | None) -> Any:
        """What an argument is on this rank."""
        if kind is None or value is None:
            return value
        if isinstance(value, (list, tuple)):
            return [self._local(label, t, kind) for label, t in _labelled(key, value)]
        return self._local(key, value, kind)

    def _local(self, label: str, tensor: Tensor, kind: str) -> Tensor:
        if not isinstance(tensor, DTensor):
            raise RuntimeError(
                f"{self._name}: {label} is a plain tensor, expected a DTensor as other arguments "
                "are; a query or gain is distributed with Replicate()"
            )
        if tensor.device_mesh != self._mesh:
            raise RuntimeError(
                f"{self._name}: {label} is on {tensor.device_mesh}, expected {self._mesh} as other "
                "arguments are"
            )
        expected = self._expected(kind)
        # What was not asked for has no elements, and lies nowhere.
        if tensor.placements != expected and not _is_nothing(tensor):
            raise RuntimeError(
                f"{self._name}: {label} has placements {tensor.placements}, expected {expected}: "
                "redistribute it first"
            )
        return tensor.to_local()

    def _expected(self, kind: str) -> tuple[Placement, ...]:
        if kind is _TOKENS:
            return self._placements
        if kind is _ROWS:
            return tuple(
                Shard(placement.dim + 1) if isinstance(placement, Shard) else placement
                for placement in self._placements
            )
        if kind is _SUM:
            return tuple(
                Partial() if isinstance(placement, Shard) else placement
                for placement in self._placements
            )
        return tuple(Replicate() for _ in self._placements)

    def whole(self, result: Tensor | Sequence[Tensor], kind: str) -> DTensor | list[DTensor]:
        """A result of this rank as a part of what all ranks have."""
        if not isinstance(result, Tensor):
            return [self.whole(tensor, kind) for tensor in result]
        placements, shape = self._expected(kind), list(result.shape)
        if _is_nothing(result):
            placements = self._expected(_VECTOR)
        elif kind in (_TOKENS, _ROWS):
            first = 1 if kind is _ROWS else 0
            shape[first : first + len(self._sizes)] = self._sizes
        stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return DTensor.from_local(
            result, self._mesh, placements, run_check=False, shape=torch.Size(shape),
            stride=tuple(stride),
        )  # fmt: skip


def _is_nothing(tensor: Tensor) -> bool:
    """Whether an operator returned it in the place of what was not asked for."""
    return tuple(tensor.shape) == (0,)


def _labelled(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, (list, tuple)):
        for index, tensor in enumerate(value):
            yield f"{key}[{index}]", tensor
    elif isinstance(value, Tensor):
        yield key, value
