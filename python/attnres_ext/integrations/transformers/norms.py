"""Norms, recognised by what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnres_ext.integrations.transformers.stream import Stream

__all__ = ["NormForm", "NormRead", "recognise"]


class NormForm(NamedTuple):
    """What a norm computes.

    Attributes:
        eps: Epsilon of an RMSNorm with a gain, which a read fuses; None for any other norm.
        offset: What is added to the weight to give the gain: 1 where weights are stored around 0.
    """

    eps: float | None
    offset: float


#: What modules raise for arguments that they do not take.
_MISTAKES = (RuntimeError, TypeError, ValueError, IndexError)


def recognise(
    norm: nn.Module, hidden_size: int, device: torch.device | str = "cpu"
) -> NormForm | None:
    """What ``norm`` computes on ``[..., hidden_size]``, or None if its scale is not removed.

    It is tried with random weights in float32 in the place of its own, so that neither names nor
    trained values (a gain of ones) decide. Its hooks do not run.

    Args:
        norm: The module, left as it was.
        hidden_size: ``D``.
        device: Where its kernels run; a module on the meta device is tried on the CPU.
    """
    # A norm has a gain and a bias; what has matrices need not be tried.
    if any(p.numel() > hidden_size for p in norm.parameters(recurse=False)):
        return None
    device = torch.device("cpu" if torch.device(device).type == "meta" else device)
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(device)

    with torch.no_grad(), _random_values(norm, draw):
        x = draw(8, hidden_size)
        if not _removes_scale(norm.forward, x):
            return None
        parameters = dict(norm._parameters)
        weight = parameters.pop("weight", None)
        others = [p for p in parameters.values() if p is not None]
        if weight is None or weight.shape != (hidden_size,) or others:
            return NormForm(None, 0.0)
        # Rows small enough for the epsilon to show.
        scales = torch.logspace(-3, 1, len(x), dtype=torch.float32, device=device)
        x = x * scales[:, None]
        y = norm.forward(x)
        for eps in {v for v in vars(norm).values() if isinstance(v, float) and 0 <= v < 0.1}:
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                if torch.allclose(y, normed * (weight + offset), rtol=1e-4, atol=1e-6):
                    return NormForm(eps, offset)
    return NormForm(None, 0.0)


@contextmanager
def _random_values(norm: nn.Module, draw: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, the norm has other parameters, and buffers where those are tried.

    Not a copy: what hangs on a module (hooks, and with them whole models) need not be copyable.
    """
    own = [(tensors, dict(tensors)) for tensors in (norm._parameters, norm._buffers)]
    place = draw(0)
    try:
        for name, value in norm._parameters.items():
            norm._parameters[name] = None if value is None else draw(*value.shape)
        for name, value in norm._buffers.items():
            if value is not None and value.is_meta:
                norm._buffers[name] = draw(*value.shape)
            elif value is not None:
                dtype = place.dtype if value.is_floating_point() else value.dtype
                norm._buffers[name] = value.to(place.device, dtype, copy=True)
        yield
    finally:
        for tensors, values in own:
            tensors.clear()
            tensors.update(values)


def _removes_scale(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the result is finite, depends on the input, but not on the input's scale."""
    try:
        large, larger, other = function(1e3 * x), function(4e3 * x), function(1e3 * x.flip(0))
    except _MISTAKES:
        return False  # whatever it is, it maps no [8, D] to anything
    return (
        isinstance(large, Tensor)
        and large.shape == x.shape
        and bool(large.isfinite().all())
        and torch.allclose(large, larger, rtol=1e-3, atol=1e-4)
        and not torch.allclose(large, other, rtol=1e-3, atol=1e-4)
    )


class NormRead:
    """In the place of a norm's ``forward``: given a :class:`Stream` it reads a site, given a tensor
    it is the norm.

    It knows its norm and nothing else, so that a copy of the norm reads as well as the norm.
    """

    def __init__(self, norm: nn.Module, form: NormForm) -> None:
        self.norm = norm
        self.eps, self._offset = form
        self.previous: Callable | None = vars(norm).get("forward")

    def gain(self) -> Tensor:
        """Gain ``[D]`` of the RMSNorm."""
        weight = self.norm.weight
        return weight.float() + self._offset if self._offset else weight

    def original(self, x: Tensor) -> Tensor:
        """The norm itself."""
        return self.previous(x) if self.previous else type(self.norm).forward(self.norm, x)

    def forward(self, hidden_states: Tensor | Stream, *args, **kwargs) -> Tensor:
        """Reads a site, or normalises a tensor."""
        if isinstance(hidden_states, Stream):
            return hidden_states.read(self)
        return self.original(hidden_states, *args, **kwargs)
