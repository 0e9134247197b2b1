"""One forward pass of a decoder: what its layers share, and what it hands from one to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from attnres_ext.integrations.transformers.norms import NormRead
from attnres_ext.integrations.transformers.stream import Stream
from attnres_ext.residual import AttentionResiduals
from attnres_ext.torch_internals import saving_hook

__all__ = ["MODULE", "FinalRead", "LayerRead", "begin", "end"]

#: The name under which a decoder holds its ``AttentionResiduals``.
MODULE = "attn_res"


class ForwardPass:
    """What the layers of one forward share. Nothing of it outlives the forward.

    Between layers flows what the last sublayer wrote, so that whatever is added to hidden states on
    the way (a steering vector, image features) is written along with it. When hidden states are
    asked for, the mix flows instead, in the scale of the usual stream: at zero queries these are
    the base model's hidden states.
    """

    def __init__(
        self, residual: AttentionResiduals, hidden_states: bool, outer: ForwardPass | None
    ) -> None:
        self.residual = residual
        self.state = residual.start(None)
        self.outer = outer
        self.entered = False  # whether a layer has run
        self._shows_hidden_states = hidden_states
        self._last: Stream | None = None
        self._shown: Tensor | None = None

    def enter(self, sites: Sequence[int], hidden: Tensor, repeated: bool = False) -> Stream:
        """The stream for whoever reads one of ``sites`` next and gets ``hidden`` ``[..., D]``."""
        if self.state.in_graph():  # which looks at no number of a site
            return Stream(self.residual, self.state, hidden, hidden.dtype)
        turn = self.state.site
        if turn not in sites:
            raise RuntimeError(
                f"Attention Residuals: site {' or '.join(map(str, sites))} is read when site "
                f"{turn} is next; layers were left out or repeated (layerdrop, early exit), which "
                "moves every later site"
            )
        last = self._last
        if last is None:
            return Stream(self.residual, self.state, hidden, hidden.dtype, repeated)
        if self._shown is not None:
            changed = hidden is not self._shown
            hidden = last.pending + (hidden - self._shown) if changed else last.pending
        return last.then(hidden, repeated)

    def leave(self, stream: Stream) -> Tensor:
        """What a layer that ends with ``stream`` returns, ``[..., D]``."""
        self.entered = True
        if self.state.in_graph():
            if self._shows_hidden_states:
                raise RuntimeError(
                    "hidden states were asked for, which a layer that is compiled by itself does "
                    "not show: compile the model"
                )
            return stream.pending
        self._last = stream
        if not self._shows_hidden_states:
            return stream.pending
        self._shown = stream.peek()
        return self._shown


_running = threading.local()

#: Input of a layer under a checkpoint that wraps it -> what to repeat in the backward.
_checkpointed: MutableMapping[Tensor, tuple[ForwardPass, Stream]] = WeakIdKeyDictionary()


def _current() -> ForwardPass | None:
    return getattr(_running, "current", None)


def begin(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the decoder."""
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        asked = getattr(decoder.config, "output_hidden_states", False)
    # A list of indices asks too, and so does index 0.
    shows = asked is not None and asked is not False
    _running.current = ForwardPass(getattr(decoder, MODULE), shows, _current())


def end(decoder: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the decoder, called on errors too."""
    current = _current()
    _running.current = None if current is None else current.outer


class LayerRead:
    """In the place of a decoder layer's ``forward``: the layer's own, with a :class:`Stream` for
    its hidden states."""

    def __init__(self, layer: nn.Module, first_sites: Sequence[int]) -> None:
        self._layer = layer
        self._first_sites = tuple(first_sites)  # one for each of its runs in a forward
        self.previous: Callable | None = vars(layer).get("forward")

    def forward(self, *args, **kwargs) -> Any:
        """The layer's forward; tensors in, tensors out."""
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
        else:
            hidden, *args = args
        current = _current()
        if current is None:
            current, stream = self._again(hidden)
        else:
            stream = current.enter(self._first_sites, hidden, self._checkpoints())
            if not torch.compiler.is_compiling() and saving_hook() is not None:
                stream.repeated = True
                _checkpointed[hidden] = current, stream
        if self.previous is None:
            output = type(self._layer).forward(self._layer, stream, *args, **kwargs)
        else:
            output = self.previous(stream, *args, **kwargs)
        if isinstance(output, tuple):
            return (current.leave(output[0]), *output[1:])
        return current.leave(output)

    def _again(self, hidden: Tensor) -> tuple[ForwardPass, Stream]:
        """The forward that a checkpoint around the layer repeats."""
        if hidden not in _checkpointed:
            raise RuntimeError(
                f"{type(self._layer).__name__} runs outside of its model's forward, where there "
                "are no sources to attend over; a checkpoint may wrap a layer, but not several"
            )
        return _checkpointed[hidden]

    def _checkpoints(self) -> bool:
        layer = self._layer
        if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return False
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise RuntimeError(
                "activation checkpointing of a model with Attention Residuals needs "
                "use_reentrant=False, the default: a layer reads more tensors than its arguments"
            )
        return True


class FinalRead(NormRead):
    """In the place of the ``forward`` of the norm behind the last layer."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """Reads the output site; before the first layer and outside of a forward it is the
        norm."""
        current = _current()
        if isinstance(hidden_states, Stream) or current is None or not current.entered:
            return super().forward(hidden_states, *args, **kwargs)
        return current.enter((current.residual.num_sublayers,), hidden_states).read(self)
