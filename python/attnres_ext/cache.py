"""A preallocated store of blocks for inference, changed in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from attnres_ext import _C
from attnres_ext.scratch import Scratch
from attnres_ext.side_stream import SideStream

__all__ = ["BlockCache"]


class BlockCache:
    """Slots for the blocks of one forward, reused from forward to forward.

    Slot 0 .. are finished blocks; the next one is *open*: it is the running sum of the block being
    computed. Closing it is counting one up, not a copy. The reciprocal RMS of a block is computed
    when it is written and reused by every later read. Nothing is allocated after construction,
    except, once, scratch memory, and unless ``reuse_result``, the results of reads that are given
    no ``out``: steps can be captured in CUDA graphs.

    Blocks live within one forward of the current tokens: nothing is kept from one decoding step to
    the next.

    Args:
        capacity: Number of slots: blocks and the embedding.
        shape: Leading shape of what is written, or the number of tokens.
        hidden_size: ``D``.
        dtype: Dtype of the slots.
        device: Device of the slots; None means the default device.
        eps: Epsilon of the key RMSNorm.
        side_stream: Where phase 1 runs, beside the stream that reads and writes; None means on that
            stream.
        reuse_result: Whether reads that are given no ``out`` share one tensor of the cache's, which
            each of them overwrites; otherwise each allocates its own.

    Raises:
        ValueError: For a capacity, shape, size, dtype or stream that cannot be.
        TypeError: For a capacity, shape or dtype that is none.
    """

    def __init__(
        self,
        capacity: int,
        shape: int | Sequence[int],
        hidden_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        eps: float = 1e-6,
        side_stream: torch.cuda.Stream | None = None,
        reuse_result: bool = False,
    ) -> None:
        self._leading = (shape,) if isinstance(shape, int) else tuple(shape)
        if not hasattr(capacity, "__index__"):
            raise TypeError(f"BlockCache: capacity is {capacity!r}, expected an integer")
        if not all(hasattr(size, "__index__") for size in self._leading):
            raise TypeError(f"BlockCache: shape is {shape!r}, expected integers")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"BlockCache: dtype is {dtype!r}, expected a torch.dtype")
        self._state = _C.CacheState(capacity)
        if any(size < 0 for size in self._leading):
            raise ValueError(f"BlockCache: shape is {self._leading}, expected sizes not below 0")
        if hidden_size < 1:
            raise ValueError(f"BlockCache: hidden_size is {hidden_size}, expected at least 1")
        if not dtype.is_floating_point:
            raise ValueError(f"BlockCache: dtype is {dtype}, expected a floating point dtype")
        if capacity > _C.max_sources:
            raise ValueError(
                f"BlockCache: capacity is {capacity}, at most {_C.max_sources} slots are supported"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        num_tokens = math.prod(self._leading)
        # Made in inference mode, they could not be written outside of it.
        with torch.inference_mode(False):
            self._slots = torch.empty(capacity, num_tokens, hidden_size, dtype=dtype, device=device)
            compute = torch.promote_types(dtype, torch.float32)
            self._rstd = torch.empty(capacity, num_tokens, dtype=compute, device=device)
        if side_stream is not None and side_stream.device != self._slots.device:
            raise ValueError(
                f"BlockCache: side_stream is on {side_stream.device}, "
                f"expected {self._slots.device} as the slots"
            )
        self._side = SideStream(side_stream)
        self._reuse_result = reuse_result
        # How often this memory has been begun anew, by this cache or one that shares it.
        self._begun = [0]
        self._generation = 0
        self._scratch = Scratch(self.device)
        # Mixes [S, M, D] and log-sum-exps [S, M] for the open block's sites.
        self._phase1: tuple[Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._state.capacity

    @property
    def num_sealed(self) -> int:
        """Number of closed slots; also the index of the open one."""
        return self._state.sealed

    @property
    def generation(self) -> int:
        """Which use of its memory the cache holds; every :meth:`reset` begins another."""
        return self._generation

    @property
    def open_holds_partial(self) -> bool:
        """Whether the open slot holds a partial sum."""
        return self._state.open_holds_partial

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the slots."""
        return self._slots.dtype

    @property
    def device(self) -> torch.device:
        """Device of the slots."""
        return self._slots.device

    @property
    def nbytes(self) -> int:
        """Bytes of slots and reciprocal RMS, without scratch memory."""
        return self._slots.nbytes + self._rstd.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is written and read, ``(*leading, hidden_size)``."""
        return (*self._leading, self.hidden_size)

    def sources(self) -> list[Tensor]:
        """Views ``[..., D]`` of the slots that a read attends over."""
        return [slot.view(self.shape) for slot in self._slots[: self._state.num_sources].unbind(0)]

    def reset(self) -> None:
        """Opens slot 0 again. Contents are left to be overwritten.

        What phase 1 was started is waited for: a CUDA graph of a forward that stops before its last
        read has to end with this, or the capture ends with work that nobody waits for.
        """
        self._side.join()
        self._state.reset()
        self._begin()

    def close(self) -> None:
        """Seals the open slot: the running sum becomes a finished block.

        Raises:
            RuntimeError: If the open slot holds nothing, every slot is closed, or another cache
                has taken over the memory (:meth:`resized`).
        """
        self._check_owner()
        self._state.close()
        self._phase1 = None

    def write(self, delta: Tensor) -> None:
        """Adds ``delta`` ``[..., D]`` to the open slot, without reading.

        Raises:
            RuntimeError: If every slot is closed, ``delta`` asks for a gradient, or another cache
                has taken over the memory.
            RuntimeError: If ``delta`` does not fit (:meth:`check_fits`).
        """
        self._check_owner()
        self.check_fits("delta", delta)
        slot, add = self._open()
        torch.ops.attnres.block_cache_write(self._slots, self._rstd, delta, slot, add, self.eps)
        self._state.begin_write()

    def attend(
        self,
        delta: Tensor | None,
        query: Tensor,
        key_weight: Tensor | None = None,
        *,
        out_weight: Tensor | None = None,
        out_eps: float | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Adds ``delta`` to the open slot and attends over all slots in use, in one kernel (paper,
        Eq. 5-6).

        Args:
            delta: ``[..., D]``, or None to read without adding anything.
            query: Pseudo-query ``[D]``.
            key_weight: Gain of the key RMSNorm ``[D]``.
            out_weight: Gain ``[D]`` of the following RMSNorm, fused when given.
            out_eps: Its epsilon; None takes the cache's.
            scale: Factor on the logits.
            out: Where the result goes; None allocates it, or with ``reuse_result`` overwrites the
                one before.

        Returns:
            The mix ``[..., D]`` in the cache's dtype: ``out``, if it is given.

        Raises:
            RuntimeError: If every slot is closed and ``delta`` is given or asks for a gradient, the
                cache holds nothing to read, or another cache has taken over the memory.
            RuntimeError: If ``delta`` does not fit (:meth:`check_fits`).
        """
        self._check_owner()
        if delta is None:
            if self._state.num_sources == 0:
                raise RuntimeError("block cache: attend has nothing to read, the cache is empty")
            slot, add = self._state.num_sources - 1, False
        else:
            self.check_fits("delta", delta)
            slot, add = self._open()
        out = self._result(out)
        torch.ops.attnres.block_cache_attend(
            self._slots,
            self._rstd,
            delta,
            slot,
            add,
            query,
            key_weight,
            out_weight,
            self.eps,
            out_eps,
            scale,
            out,
        )
        if delta is not None:
            self._state.begin_write()
        return out

    def inter(
        self, queries: Tensor, key_weights: Tensor | None = None, *, scale: float = 1.0
    ) -> None:
        """Phase 1: attends over the sealed slots for all ``S`` queries ``[S, D]`` of the open block
        (paper, Algorithm 1).

        The results stay in the cache's scratch memory, for :meth:`merge`. With a side stream this
        returns at once, and the first merge waits: call it when the block before is closed, and
        what the current stream does until then hides it.

        Raises:
            RuntimeError: If no slot is sealed, or another cache has taken over the memory.
            RuntimeError: If ``queries`` is not of that shape.
        """
        self._check_owner()
        if self._state.sealed == 0:
            raise RuntimeError("block cache: inter has nothing to read, no slot is closed")
        if not isinstance(queries, Tensor):
            kind = type(queries).__name__
            raise TypeError(f"block cache: queries is a {kind}, expected a tensor")
        if queries.dim() != 2 or queries.shape[1] != self.hidden_size:
            raise RuntimeError(
                f"block cache: queries has shape {tuple(queries.shape)}, "
                f"expected [S, {self.hidden_size}]"
            )
        shape = queries.shape[0], *self._slots.shape[1:]
        wide = torch.promote_types(self.dtype, torch.float32)
        out = self._scratch.tensor("mixes", shape, self.dtype)
        lse = self._scratch.tensor("lse", shape[:-1], wide)
        arguments = (
            self._slots, self._rstd, self._state.sealed, queries, key_weights, scale, out, lse
        )  # fmt: skip
        self._side.run(
            lambda: torch.ops.attnres.block_cache_inter(*arguments),
            [argument for argument in arguments if isinstance(argument, Tensor)],
        )
        self._phase1 = out, lse

    def merge(
        self,
        index: int,
        delta: Tensor,
        query: Tensor,
        key_weight: Tensor | None = None,
        *,
        out_weight: Tensor | None = None,
        out_eps: float | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Phase 2: adds ``delta`` to the open slot and merges it with row ``index`` of the last
        :meth:`inter`.

        Other arguments, result and errors as for :meth:`attend`.
        """
        self._check_owner()
        rows = 0 if self._phase1 is None else len(self._phase1[0])
        if not 0 <= index < rows:
            raise RuntimeError(
                f"block cache: merge has no row {index}, inter was called for {rows} queries since "
                "the last close"
            )
        self.check_fits("delta", delta)
        slot, add = self._open()
        mixes, lse = self._phase1
        hidden = self._result(out)
        self._side.join()
        torch.ops.attnres.block_cache_merge(
            self._slots,
            self._rstd,
            mixes[index],
            lse[index],
            delta,
            slot,
            add,
            query,
            key_weight,
            out_weight,
            self.eps,
            out_eps,
            scale,
            hidden,
        )
        self._state.begin_write()
        return hidden

    def check_fits(self, name: str, tensor: Tensor) -> None:
        """Raises unless ``tensor`` may be written.

        Raises:
            RuntimeError: Unless it has the cache's shape and device, and a dtype that the cache's
                holds without rounding.
            RuntimeError: If it asks for a gradient.
            TypeError: If it is no tensor.
        """
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"block cache: {name} is a {kind}, expected a tensor")
        if tuple(tensor.shape) != self.shape:
            raise RuntimeError(
                f"block cache: {name} has shape {tuple(tensor.shape)}, expected {self.shape}"
            )
        if (
            tensor.dtype != self.dtype
            and torch.promote_types(tensor.dtype, self.dtype) != self.dtype
        ):
            raise RuntimeError(
                f"block cache: {name} has dtype {tensor.dtype}, expected {self.dtype} or a dtype "
                "that it holds without rounding"
            )
        if tensor.device != self.device:
            raise RuntimeError(f"block cache: {name} is on {tensor.device}, expected {self.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"block cache: {name} requires a gradient, but the cache is changed in place and "
                "keeps none; run under torch.no_grad or torch.inference_mode"
            )

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in the memory of the slots."""
        return tensor.untyped_storage().data_ptr() == self._slots.untyped_storage().data_ptr()

    def stacked(self, vectors: Sequence[Sequence[Tensor]]) -> Tensor:
        """Equally many vectors ``[D]`` of each kind as ``[kinds, count, D]``, in memory of the
        cache's own."""
        shape = len(vectors), len(vectors[0]), self.hidden_size
        kept = self._scratch.tensor("vectors", shape, vectors[0][0].dtype)
        with torch.no_grad():
            for row, kind in zip(kept.unbind(0), vectors, strict=True):
                torch.stack(list(kind), out=row)
        return kept

    def resized(self, shape: int | Sequence[int]) -> BlockCache:
        """Another cache in the same memory, for as many tokens or fewer.

        It takes the memory over: this cache is to be :meth:`reset` before it is used again, and
        then takes it back.

        Args:
            shape: Leading shape of what is written to it.

        Raises:
            RuntimeError: If it has more tokens than this cache.
        """
        leading = (shape,) if isinstance(shape, int) else tuple(shape)
        num_tokens, room = math.prod(leading), self._slots.shape[1]
        if any(size < 0 for size in leading) or num_tokens > room:
            raise RuntimeError(
                f"block cache: resized to shape {leading}, expected at most {room} tokens in all"
            )

        def part(whole: Tensor, *sizes: int) -> Tensor:
            return whole.view(-1)[: math.prod(sizes)].view(sizes)

        # With the same side stream, what one starts the other waits for; with the same scratch.
        other = copy(self)
        other._state = _C.CacheState(self.capacity)
        other._leading = leading
        other._slots = part(self._slots, self.capacity, num_tokens, self.hidden_size)
        other._rstd = part(self._rstd, self.capacity, num_tokens)
        other._begin()
        return other

    def _begin(self) -> None:
        """Takes the memory, from whichever cache had it."""
        self._begun[0] += 1
        self._generation = self._begun[0]
        self._phase1 = None

    def _check_owner(self) -> None:
        if self._generation != self._begun[0]:
            raise RuntimeError(
                "block cache: another cache of the same memory was taken into use since (resized); "
                "reset this one before it is used again"
            )

    def _result(self, out: Tensor | None) -> Tensor:
        if out is None and self._reuse_result:
            return self._scratch.tensor("result", self.shape, self.dtype)
        if out is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if tuple(out.shape) != self.shape or out.dtype != self.dtype:
            raise RuntimeError(
                f"block cache: out has shape {tuple(out.shape)} and dtype {out.dtype}, "
                f"expected {self.shape} and {self.dtype}"
            )
        return out

    def _open(self) -> tuple[int, bool]:
        """The open slot and whether a write adds to it; counted once the operator has run."""
        return self._state.open_slot, self._state.open_holds_partial
