"""Where sequences lie in the rows of a batch: several in one row, or one in each with padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packing", "Padding"]


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
                f"cu_seqlens is {ends}, expected values that rise from 0 to the {shape[1]} tokens "
                "of input_ids"
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
    def has_predecessor(self) -> Tensor:
        """``[T]``, bool: whether another token of its sequence is before a token."""
        return ~self.begins

    @property
    def visible(self) -> Tensor:
        """``[T, T]``, bool: whether the token of a row may attend to that of a column."""
        same = self.sequence.unsqueeze(-1) == self.sequence
        return same.tril()


@dataclass(frozen=True)
class Padding:
    """Which tokens of a batch are there, where rows are shorter than others.

    Attributes:
        present: ``[B, T]``, bool: which of these tokens are there.
        seen: ``[B, L]``, bool: which of all tokens up to these, the last ``T`` of them.
    """

    present: Tensor
    seen: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, shape: torch.Size) -> Padding:
        """Of a mask as Hugging Face models take it.

        Args:
            attention_mask: ``[B, T]``, bool or integers: 1 for a token, 0 for padding.
            shape: That of the token ids.

        Raises:
            ValueError: It is something else.
        """
        if attention_mask.shape != shape or attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and dtype "
                f"{attention_mask.dtype}, expected {tuple(shape)} like input_ids, bool or "
                "integers"
            )
        present = attention_mask.bool()
        return cls(present, present)

    def without_padding(self, x: Tensor) -> Tensor:
        """``x`` ``[B, T, D]``, zero where no token is."""
        return x.masked_fill(~self.present.unsqueeze(-1), 0)

    @property
    def has_predecessor(self) -> Tensor:
        """``[B, T]``, bool: whether a token is here and the place before it holds one, too."""
        return self.present & self.present.roll(1, dims=1)

    @property
    def visible(self) -> Tensor:
        """``[B, 1, T, L]``, bool: whether these tokens may attend to each token up to them.

        What is no token sees itself, so that nothing divides by zero.
        """
        tokens, length = self.present.shape[1], self.seen.shape[1]
        every = torch.ones(tokens, length, dtype=torch.bool, device=self.seen.device)
        before = every.tril(length - tokens)
        itself = before.triu(length - tokens)
        return (self.seen[:, None, None, :] & before) | itself
