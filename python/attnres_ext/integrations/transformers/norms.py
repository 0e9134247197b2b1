"""Norms, recognised by what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def recognise(norm: nn.Module, hidden_size: int) -> NormForm | None:
    """What ``norm`` computes on ``[..., hidden_size]``, or None if its scale is not removed.

    A copy in float32 with random weights is tried, so that neither names nor trained values (a gain
    of ones) decide.
    """
    trial = _trial_copy(norm)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in trial.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        x = torch.randn(8, hidden_size)
        if not _removes_scale(trial, x):
            return None
        parameters = dict(trial.named_parameters())
        weight = parameters.pop("weight", None)
        if weight is None or weight.shape != (hidden_size,) or parameters:
            return NormForm(None, 0.0)
        # Rows small enough for the epsilon to show.
        x = x * torch.logspace(-3, 1, len(x))[:, None]
        y = trial(x)
        for eps in {v for v in vars(trial).values() if isinstance(v, float) and 0 <= v < 0.1}:
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                if torch.allclose(y, normed * (weight + offset), rtol=1e-4, atol=1e-6):
                    return NormForm(eps, offset)
    return NormForm(None, 0.0)


def _trial_copy(norm: nn.Module) -> nn.Module:
    trial = copy.deepcopy(norm)
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        getattr(trial, kind).clear()
    if any(p.is_meta for p in trial.parameters()):
        trial = trial.to_empty(device="cpu")
    return trial.to(device="cpu", dtype=torch.float32)


def _removes_scale(norm: nn.Module, x: Tensor) -> bool:
    """Whether the norm's output is finite, depends on its input, but not on its input's scale."""
    try:
        large, larger, other = norm(1e3 * x), norm(4e3 * x), norm(1e3 * x.flip(0))
    except Exception:
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
