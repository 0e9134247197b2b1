"""What a decoder layer sees in place of the residual stream.

A pre-norm layer does two things with its stream: a norm reads it, and ``+`` adds a sublayer's
output to it. :class:`Stream` is an object that can do exactly that: its read is depth attention,
its sum is what waits to be written. So a layer's own code runs unchanged, and nothing of it is
copied.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnres_ext import ops

if TYPE_CHECKING:
    from attnres_ext.integrations.transformers.norms import NormRead
    from attnres_ext.residual import AttentionResiduals
    from attnres_ext.residual_training import TrainingState

__all__ = ["MisfitError", "Stream", "StreamLike"]

# A tracer says `operator.add` for the plain sign.
_ADDITIONS = (
    operator.add,
    torch.add,
    torch.Tensor.add,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
)


class MisfitError(RuntimeError):
    """A layer does something with the residual stream that Attention Residuals have no meaning
    for."""


class _MissingError(MisfitError, AttributeError):
    """The same, so that ``hasattr`` says no."""


class StreamLike(ABC):
    """The operations that a layer may apply to its stream: ``+`` on either side, and ``to`` where
    that changes nothing.

    Anything else is refused, by name.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the stream, ``[..., D]``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the stream."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the stream."""

    @abstractmethod
    def plus(self, delta: Tensor) -> StreamLike:
        """The stream after ``delta`` ``[..., D]`` is added."""

    def to(self, *args: Any, **kwargs: Any) -> StreamLike:
        """The stream itself, if it has the dtype and the device already."""
        for wanted in (*args, *kwargs.values()):
            if isinstance(wanted, torch.dtype):
                same = wanted == self.dtype
            elif isinstance(wanted, (str, torch.device)):
                same = torch.device(wanted) == self.device
            elif isinstance(wanted, bool):
                same = True  # non_blocking
            else:
                same = wanted == self.device.index
            if not same:
                raise MisfitError(f"casts or moves the residual stream to {wanted}")
        return self

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
        raise _MissingError(f"uses `.{name}` of the residual stream")

    def _refuse(self, *args: Any) -> Any:
        raise MisfitError("does something else with the residual stream than to read or to add")

    # Python looks these up on the class.
    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _refuse
    __pow__ = __neg__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = _refuse
    __float__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


class Stream(StreamLike):
    """The residual stream between a sublayer's ``+`` and the next norm.

    Args:
        residual: Whose sites read.
        state: What was written before.
        pending: ``[..., D]``, to be written by the next read.
        dtype: Dtype of the stream. A sublayer's output is brought to it, as ``+`` would do.
        repeated: Whether a layer under activation checkpointing begins here: it reads here once
            more in the backward, when the state has what was pending.
    """

    def __init__(
        self,
        residual: AttentionResiduals,
        state: TrainingState,
        pending: Tensor,
        dtype: torch.dtype,
        repeated: bool = False,
    ) -> None:
        self._residual = residual
        self._state = state
        self.repeated = repeated
        self._read = False
        self._shape, self._dtype, self._device = pending.shape, dtype, pending.device
        self._pending: Tensor | None = pending
        # A layer that is compiled by itself looks at no number of a site.
        self.site = None if state.in_graph() else state.site

    @property
    def shape(self) -> torch.Size:
        """Shape of the stream, ``[..., D]``."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stream."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the stream."""
        return self._device

    @property
    def pending(self) -> Tensor:
        """What waits to be written, ``[..., D]``."""
        return self._pending

    def plus(self, delta: Tensor) -> Stream:
        """The stream after ``delta`` ``[..., D]`` is added."""
        if not self._read:
            raise MisfitError(
                "adds to the residual stream twice without a norm reading it in between"
            )
        dtype = torch.promote_types(self._dtype, delta.dtype)
        after = Stream(self._residual, self._state, delta.to(dtype), dtype)
        after.site = None if self.site is None else self.site + 1
        return after

    def then(self, pending: Tensor, repeated: bool) -> Stream:
        """The same stream with something else to be written, for the next layer."""
        return Stream(self._residual, self._state, pending, self._dtype, repeated)

    def read(self, norm: NormRead) -> Tensor:
        """What ``norm`` returns for the mix at the next site, ``[..., D]``.

        At zero queries the mix is the usual stream over the number of sources ``n``. The norm
        removes that factor, but for its epsilon: taken as ``eps / n²``, it acts as it did on the
        usual stream.
        """
        if self._read and not self.repeated:
            raise MisfitError("reads the same residual stream with two norms (parallel sublayers)")
        if not self._read:
            self._state.write(self._pending)
            # A checkpoint keeps this object: not what nobody needs again.
            self._read, self._pending = True, None
        if norm.eps is not None:
            return self._state.read_counting(self.site, norm.gain(), norm.eps, scale="eps")
        return norm.original(self._state.read_counting(self.site, scale="mix"))

    def peek(self) -> Tensor:
        """The usual stream's counterpart, ``[..., D]``: the mix at the next site, times ``n``.

        Differentiable. Nothing is written or read by it.
        """
        query, key_weight = self._residual.queries[self.site], self._residual.key_weights[self.site]
        sources = self._state.sources_with(self._pending)
        mix = ops.depth_attention(sources, query, key_weight, eps=self._residual.eps)
        return mix * len(sources)
