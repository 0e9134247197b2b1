"""The short convolution before KDA's queries, keys and values (Kimi Linear report, §4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext.torch_internals import is_transformed

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Module):
    """A causal convolution of each channel by itself, then SiLU: ``[B, T, C] -> [B, T, C]``.

    Attributes:
        weight: ``[C, 1, taps]``, the last tap on the current token; named as in the public
            checkpoints.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))

    def reset_parameters(self) -> None:
        """Uniform within ``taps^-1/2``, what ``nn.Conv1d`` does for one input channel."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: Tensor, past: Tensor | None = None, position: Tensor | None = None
    ) -> Tensor:
        """Convolves ``x`` ``[B, T, C]``.

        Args:
            x: ``[B, T, C]``.
            past: The last ``taps - 1`` inputs before ``x``, ``[B, taps - 1, C]``, replaced by the
                last ones of these; None for zeros.
            position: Each token's place in its sequence ``[T]``, where several are packed: taps do
                not reach back past its beginning. Not together with ``past``.
        """
        weight = self.weight[:, 0].to(x.dtype)
        convolve = _causal_convolution if is_transformed() else _CausalConvolution.apply
        if past is None:
            return F.silu(convolve(x, weight, position))
        tokens, seen = x.shape[1], past.shape[1]
        x = torch.cat([past, x], dim=1)
        past.copy_(x[:, tokens:])
        if tokens == 1:
            return F.silu((x * weight.T).sum(1, keepdim=True))
        return F.silu(convolve(x, weight, None)[:, seen:])


def _causal_convolution(x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    """``out[t] = sum_j weight[:, j] * x[t - (taps - 1) + j]``, zeros before the first token: the
    definition, which can be differentiated and mapped in any way."""
    out = x * weight[:, -1]
    for delay in range(1, min(weight.shape[-1], x.shape[1])):
        reached = F.pad(_reached(x[:, :-delay], position, delay), (0, 0, delay, 0))
        out = out + reached * weight[:, -1 - delay]
    return out


class _CausalConvolution(torch.autograd.Function):
    """The same with a backward of its own.

    One fused multiply-add over the whole tensor per tap, in both directions and in the layout that
    ``x`` has. A grouped ``conv1d`` wants channels first, and its backward took twice as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, position)
        tokens, taps = x.shape[1], weight.shape[-1]
        out = x * weight[:, -1]
        for delay in range(1, min(taps, tokens)):
            out[:, delay:].addcmul_(_reached(x[:, :-delay], position, delay), weight[:, -1 - delay])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, position = ctx.saved_tensors
        tokens, taps = x.shape[1], weight.shape[-1]
        grad_x = grad * weight[:, -1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, -1] = (grad * x).sum((0, 1))
        for delay in range(1, min(taps, tokens)):
            reaching = _reached(grad[:, delay:], position, delay)
            grad_x[:, :-delay].addcmul_(reaching, weight[:, -1 - delay])
            grad_weight[:, -1 - delay] = (reaching * x[:, :-delay]).sum((0, 1))
        return grad_x, grad_weight, None


def _reached(x: Tensor, position: Tensor | None, delay: int) -> Tensor:
    """``x`` ``[B, T - delay, C]``, zero where the token ``delay`` later is of another sequence."""
    if position is None:
        return x
    return x * (position[delay:] >= delay).unsqueeze(-1)
