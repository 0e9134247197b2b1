"""Kimi Delta Attention: linear attention by a gated delta rule (Kimi Linear report, §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext.models.kimi_linear import fla_kernels
from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.delta_rule import (
    chunk_gated_delta_rule,
    forget_before,
    recurrent_gated_delta_rule,
)
from attnres_ext.models.kimi_linear.linear import Linear
from attnres_ext.models.kimi_linear.packing import Packing, Padding
from attnres_ext.models.kimi_linear.short_convolution import ShortConvolution
from attnres_ext.torch_internals import is_transformed

__all__ = ["KimiDeltaAttention", "KimiDeltaState"]

# Queries and keys are divided by sqrt(sum of squares + this), as in flash-linear-attention.
_L2_EPS = 1e-6
# Inputs shorter than this go token by token.
_SHORTEST_CHUNK = 4


@dataclass
class KimiDeltaState:
    """What a KDA layer remembers of the tokens seen so far; its size does not grow with them.

    Attributes:
        convolutions: Last inputs of the queries', keys' and values' short convolutions
            ``[3, B, taps - 1, H * K]``.
        memory: State of the delta rule ``[B, H, K, V]``, float32 or wider.
    """

    convolutions: Tensor
    memory: Tensor


class KimiDeltaAttention(nn.Module):
    """One KDA sublayer, ``[B, T, D] -> [B, T, D]``.

    Queries, keys and values go through short causal convolutions and SiLU; queries and keys are
    L2-normalised per head. Each key channel decays by ``exp(g)``, ``g = -exp(A_log) softplus(f_b
    f_a x + dt_bias)``, or with ``gate_lower_bound`` (Kimi K3) ``g = bound * sigmoid(exp(A_log) (f_b
    f_a x + dt_bias))``. What is read is RMS-normalised per head and gated by a sigmoid.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        linear = config.linear_attn_config
        self.num_heads, self.head_dim, self.taps = (
            linear.num_heads,
            linear.head_dim,
            linear.short_conv_kernel_size,
        )
        self.chunk_size, self.gate_lower_bound = linear.chunk_size, linear.gate_lower_bound
        hidden, rank, channels = (
            config.hidden_size,
            linear.head_dim,
            linear.num_heads * linear.head_dim,
        )
        matrix = partial(Linear, deviation=config.initializer_range)
        self.q_proj = matrix(hidden, channels)
        self.k_proj = matrix(hidden, channels)
        self.v_proj = matrix(hidden, channels)
        self.q_conv1d = ShortConvolution(channels, self.taps)
        self.k_conv1d = ShortConvolution(channels, self.taps)
        self.v_conv1d = ShortConvolution(channels, self.taps)
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.f_a_proj = matrix(hidden, rank)
        self.f_b_proj = matrix(rank, channels)
        self.dt_bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.b_proj = matrix(hidden, self.num_heads)
        if linear.use_full_rank_gate:
            self.g_proj = matrix(hidden, channels)
        else:
            self.g_a_proj = matrix(hidden, rank)
            self.g_b_proj = matrix(rank, channels)
        self.o_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = matrix(channels, hidden)

    def reset_parameters(self) -> None:
        """Rates ``A`` in (1, 16), time steps in (1e-3, 0.1), the rest as each part has it.

        With a bounded gate ``A_log`` starts at 0, as Kimi K3's.
        """
        convolutions = self.q_conv1d, self.k_conv1d, self.v_conv1d
        for convolution in convolutions:
            convolution.reset_parameters()
        with torch.no_grad():
            if self.gate_lower_bound is None:
                self.A_log.uniform_(1, 16).log_()
            else:
                self.A_log.zero_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
            step += torch.log(-torch.expm1(-step))  # the inverse of softplus
        for part in self.children():
            if part not in convolutions:
                part.reset_parameters()

    def new_state(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> KimiDeltaState:
        """The state before the first token, zeros."""
        channels = self.num_heads * self.head_dim
        return KimiDeltaState(
            torch.zeros(3, batch_size, self.taps - 1, channels, dtype=dtype, device=device),
            torch.zeros(
                batch_size,
                self.num_heads,
                self.head_dim,
                self.head_dim,
                dtype=torch.promote_types(dtype, torch.float32),
                device=device,
            ),
        )

    def forward(
        self,
        x: Tensor,
        state: KimiDeltaState | None = None,
        packing: Packing | Padding | None = None,
    ) -> Tensor:
        """Attends from each token to itself and all before it.

        Args:
            x: ``[B, T, D]``.
            state: Continues after the tokens it has seen, and is moved on past these in place
                (inference only); None starts at nothing.
            packing: Where the sequences of one row lie, each of which starts at nothing, not
                together with ``state``; or where rows are padded.

        Returns:
            ``[B, T, D]``.
        """
        if isinstance(packing, Padding):
            # Zeros neither write to the memory nor stay in the convolutions.
            x, packing = packing.without_padding(x), None
        past = (None, None, None) if state is None else state.convolutions.unbind(0)
        position = None if packing is None else packing.position
        q = self.q_conv1d(self.q_proj(x), past[0], position)
        k = self.k_conv1d(self.k_proj(x), past[1], position)
        v = self.v_conv1d(self.v_proj(x), past[2], position)
        z, beta = self.f_b_proj(self.f_a_proj(x)), self.b_proj(x)
        gate = self.g_proj(x) if hasattr(self, "g_proj") else self.g_b_proj(self.g_a_proj(x))
        # Decays multiply up over a sequence: autocast must not narrow what follows.
        with torch.autocast(x.device.type, enabled=False):
            out = self._recurrence(q, k, v, z, beta, state, packing)
            normed = F.rms_norm(
                out, self.o_norm.normalized_shape, self.o_norm.weight.to(out.dtype), self.o_norm.eps
            )
            gated = normed.flatten(-2) * gate.to(out.dtype).sigmoid()
        return self.o_proj(gated.to(x.dtype))

    def _recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        beta: Tensor,
        state: KimiDeltaState | None,
        packing: Packing | None,
    ) -> Tensor:
        """What the delta rule reads ``[B, T, H, V]``, float32 or wider, of raw projections."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        heads = (self.num_heads, self.head_dim)
        q, k = (_normalised(x.unflatten(-1, heads).to(dtype)) for x in (q, k))
        v = v.unflatten(-1, heads)
        g = self._log_decay(z.to(dtype)).unflatten(-1, heads)
        beta = beta.to(dtype).sigmoid()
        memory = None if state is None else state.memory
        # Cheaper token by token than as one chunk; function transforms run the definition.
        transformed = is_transformed()
        few = transformed or q.shape[1] < _SHORTEST_CHUNK
        if fla_kernels.takes(v) and not transformed:
            few = few and not torch.is_grad_enabled() and packing is None
            ends = None if packing is None else packing.cu_seqlens
            out, memory = fla_kernels.delta_rule(q, k, v, g, beta, memory, ends, few_tokens=few)
            out = out.to(dtype)
        else:
            v = v.to(dtype)
            if packing is not None:
                g = forget_before(g, packing.begins)
            if few:
                out, memory = recurrent_gated_delta_rule(q, k, v, g, beta, memory)
            else:
                out, memory = chunk_gated_delta_rule(q, k, v, g, beta, memory, self.chunk_size)
        if state is not None:
            state.memory.copy_(memory)
        return out

    def _log_decay(self, z: Tensor) -> Tensor:
        """Log-decay of every channel ``[B, T, H * K]``, at most 0."""
        z = z + self.dt_bias.to(z.dtype)
        rate = self.A_log.to(z.dtype).exp().repeat_interleave(self.head_dim)
        if self.gate_lower_bound is None:
            return -rate * F.softplus(z)
        return self.gate_lower_bound * torch.sigmoid(rate * z)


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)
