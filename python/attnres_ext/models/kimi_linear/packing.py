"""Several sequences in one row, one after the other, without padding between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row ``[1, T]`` lie.

    Attributes:
        cu_seqlens: ``[sequences + 1]``, int64: where each begins, and the last ends.
        sequence: ``[T]``, int64: which sequence a token belongs to.
        position: ``[T]``, int64: a token's place in its sequence.
    """

    cu_seqlens: Tensor
    sequence: Tensor
    position: Tensor

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, shape: torch.Size, device: torch.device | None = None
    ) -> Packing:
        """Of cumulative lengths, as flash-attention has them.

        Args:
            cu_seqlens: ``[sequences + 1]``, integers that rise from 0 to ``T``. On the CPU, where
                the host waits for no device to read them.
            shape: That of the token ids, ``[1, T]``.
            device: Where tokens are; None means where ``cu_seqlens`` is.

        Raises:
            ValueError: It is something else.
        """
        if shape[0] != 1:
            raise ValueError(
                f"input_ids has shape {tuple(shape)}; with cu_seqlens all sequences lie in one "
                "row, [1, T]"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it "
                "must be [sequences + 1], integers"
            )
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != shape[1] or sorted(set(ends)) != ends:
            raise ValueError(
                f"cu_seqlens is {ends}; it must rise from 0 to the {shape[1]} tokens of input_ids"
            )
        cu_seqlens = cu_seqlens.to(device or cu_seqlens.device, torch.int64)
        tokens = torch.arange(shape[1], device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        return cls(cu_seqlens, sequence, tokens - cu_seqlens[sequence])

    @property
    def begins(self) -> Tensor:
        """``[T]``, bool: whether a token is the first of its sequence."""
        return self.position == 0

    @property
    def visible(self) -> Tensor:
        """``[T, T]``, bool: whether the token of a row may attend to that of a column."""
        same = self.sequence.unsqueeze(-1) == self.sequence
        return same.tril()
