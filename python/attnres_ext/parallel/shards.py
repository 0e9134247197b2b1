"""A sequence of tokens in equal parts on the ranks of a group, and the way between parts and whole.

Parts are those of :func:`torch.chunk`: equal, but for the last ranks', which may be shorter or
empty where the length is no multiple. What is sent is padded then, what is kept never is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SequenceShards"]

# torch 2.13 gave both their second name, and warns of the first.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, eq=False)
class SequenceShards:
    """Where the tokens of one sequence length lie.

    Args:
        length: Tokens of the sequence, on all ranks together.
        group: The ranks.
        dim: Which dimension of a tensor ``[..., D]`` they are along.
    """

    length: int
    group: dist.ProcessGroup
    dim: int = -2

    @property
    def most(self) -> int:
        """Tokens of the first rank, the most that any has."""
        return -(-self.length // self.group.size())

    @property
    def own(self) -> range:
        """The tokens of this rank."""
        begin = min(self.group.rank() * self.most, self.length)
        return range(begin, min(begin + self.most, self.length))

    def part(self, x: Tensor, dim: int | None = None) -> Tensor:
        """This rank's tokens of ``x``, which every rank has: a view, nothing is sent.

        Args:
            x: Token numbers, say.
            dim: Along which dimension its tokens are; None means as everywhere else.
        """
        return x.narrow(self.dim if dim is None else dim, self.own.start, len(self.own))

    def gather(self, x: Tensor) -> Tensor:
        """All tokens, of parts ``x``; gradients of the whole are added up over the ranks, each of
        which gets its part of the sum."""
        return _Gather.apply(x, self)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's tokens of the sum of ``x`` over all ranks; gradients of the parts are
        gathered."""
        return _ScatterSum.apply(x, self)

    def check_whole(self, name: str, x: Tensor) -> None:
        """Raises a ValueError unless ``x`` has all tokens."""
        self._check(name, x, self.length, f"the sequence of {self.length}")

    def check_part(self, name: str, x: Tensor) -> None:
        """Raises a ValueError unless ``x`` has this rank's tokens."""
        rank, size = self.group.rank(), self.group.size()
        self._check(name, x, len(self.own), f"rank {rank}'s part of {self.length} over {size}")

    def _check(self, name: str, x: Tensor, tokens: int, what: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor")
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != tokens:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected {tokens} tokens along dimension "
                f"{self.dim}: {what}"
            )

    def _gathered(self, x: Tensor) -> Tensor:
        front = _padded(x.movedim(self.dim, 0), self.most)
        whole = x.new_empty((self.most * self.group.size(), *front.shape[1:]))
        _all_gather(whole, front.contiguous(), group=self.group)
        return whole[: self.length].movedim(0, self.dim)

    def _scattered_sum(self, x: Tensor) -> Tensor:
        front = _padded(x.movedim(self.dim, 0), self.most * self.group.size())
        part = x.new_empty((self.most, *front.shape[1:]))
        _reduce_scatter(part, front.contiguous(), group=self.group)
        return part[: len(self.own)].movedim(0, self.dim)


def _padded(x: Tensor, rows: int) -> Tensor:
    """``x`` with zeros after its rows until there are so many; itself if it has them."""
    if len(x) == rows:
        return x
    return F.pad(x, (0,) * (2 * x.dim() - 1) + (rows - len(x),))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        return shards._gathered(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shards._scattered_sum(gradient), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        return shards._scattered_sum(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shards._gathered(gradient), None
