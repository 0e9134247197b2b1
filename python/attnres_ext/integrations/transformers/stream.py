"""What a decoder layer sees in place of the residual stream.

A pre-norm layer does two things with its stream: a norm reads it, and ``+`` adds a sublayer's
output to it. :class:`Stream` is an object that can do exactly that: its read is depth attention,
its sum is what waits to be written. So a layer's own code runs unchanged, and nothing of it is
copied.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnres_ext.integrations.transformers.norms import NormRead
    from attnres_ext.residual import AttentionResiduals
    from attnres_ext.residual_state import ResidualState

__all__ = ["MisfitError", "Stream", "StreamLike", "num_sources"]

_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)


class MisfitError(RuntimeError):
    """A layer does something with the residual stream that Attention Residuals have no meaning
    for."""


class StreamLike:
    """The operations that a layer may apply to its stream: ``+`` on either side.

    Anything else is refused, by name.
    """

    @property
    def shape(self) -> torch.Size:
        """Shape of the stream, ``[..., D]``."""
        raise NotImplementedError

    def plus(self, delta: Tensor) -> StreamLike:
        """The stream after ``delta`` ``[..., D]`` is added."""
        raise NotImplementedError

    def __add__(self, delta: Tensor) -> StreamLike:
        return self.plus(delta)

    def __radd__(self, delta: Tensor) -> StreamLike:
        return self.plus(delta)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function in _ADDITIONS and len(args) == 2 and not kwargs:
            left, right = args
            return left.plus(right) if isinstance(left, StreamLike) else right.plus(left)
        name = getattr(function, "__name__", str(function))
        raise MisfitError(f"applies `{name}` to the residual stream")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MisfitError(f"uses `.{name}` of the residual stream")


class Stream(StreamLike):
    """The residual stream between a sublayer's ``+`` and the next norm.

    Args:
        residual: Whose sites read.
        state: What was written before, or None at the embedding.
        pending: ``[..., D]``, to be written by the next read.
        dtype: Dtype of the stream. A sublayer's output is brought to it, as ``+`` would do.
        replayed: Whether the layer may run again from here, for activation checkpointing. Reads
            then leave ``state`` as it is.
    """

    def __init__(
        self,
        residual: AttentionResiduals,
        state: ResidualState | None,
        pending: Tensor,
        dtype: torch.dtype,
        replayed: bool = False,
    ) -> None:
        self._residual = residual
        self._state = state
        self._after: ResidualState | None = None
        self._replayed = replayed
        self._dtype = dtype
        self.pending = pending

    @property
    def shape(self) -> torch.Size:
        """Shape of the stream, ``[..., D]``."""
        return self.pending.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stream."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the stream."""
        return self.pending.device

    @property
    def state(self) -> ResidualState | None:
        """What was written before ``pending``."""
        return self._state

    def plus(self, delta: Tensor) -> Stream:
        """The stream after ``delta`` ``[..., D]`` is added."""
        if self._after is None:
            raise MisfitError(
                "adds to the residual stream twice without a norm reading it in between"
            )
        dtype = torch.promote_types(self._dtype, delta.dtype)
        return Stream(self._residual, self._after, delta.to(dtype), dtype)

    def _written(self, fresh: bool) -> ResidualState:
        """A state that holds ``pending`` too, ready for the next read; ``fresh`` leaves the
        stream's own as it is."""
        if self._state is None:
            return self._residual.start(self.pending)
        state = fork(self._state) if fresh else self._state
        state.write(self.pending)
        return state

    def read(self, norm: NormRead) -> Tensor:
        """What ``norm`` returns for the mix at the next site, ``[..., D]``.

        At zero queries the mix is the usual stream over the number of sources ``n``. The norm
        removes that factor, but for its epsilon: taken as ``eps / n²``, it acts as it did on the
        usual stream.
        """
        if self._after is not None and not self._replayed:
            raise MisfitError("reads the same residual stream with two norms (parallel sublayers)")
        self._after = state = self._written(fresh=self._replayed)
        n = num_sources(self._residual, state.site)
        if norm.eps is None:
            mix = self._read_next(state)
            return norm.original(mix if n == 1 else mix * n)
        return self._read_next(state, norm.gain(), norm.eps / n**2)

    def peek(self) -> Tensor:
        """The usual stream's counterpart, ``[..., D]``: the mix at the next site, times ``n``."""
        state = self._written(fresh=True)
        n = num_sources(self._residual, state.site)
        return self._read_next(state) * n

    def _read_next(self, state: ResidualState, *norm: Any) -> Tensor:
        if state.site == self._residual.num_sublayers:
            return state.read_output(*norm)
        return state.read(state.site, *norm)


def num_sources(residual: AttentionResiduals, site: int) -> int:
    """Over how many sources ``site`` attends: ``len(residual.sources_at(site))``."""
    return 1 + -(-site // residual.sublayers_per_block)


def fork(state: ResidualState) -> ResidualState:
    """A state that can go on by itself from here; tensors and gradient buffers are shared."""
    twin = copy.copy(state)
    twin.__dict__.update({k: list(v) for k, v in vars(state).items() if isinstance(v, list)})
    return twin
