"""Multi-head latent attention without positional encoding (Kimi Linear report, §4; DeepSeek-V2)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.linear import Linear, RMSNorm
from attnres_ext.models.kimi_linear.packing import Packing, Padding
from attnres_ext.torch_internals import is_transformed

__all__ = ["KimiLatentState", "KimiMLAAttention"]

# The public model builds its latent norms without passing rms_norm_eps on.
_LATENT_NORM_EPS = 1e-6


@dataclass
class KimiLatentState:
    """The latents of the tokens seen so far: all that keys and values of every head are made of.

    Attributes:
        latents: ``[B, max_length, kv_lora_rank + qk_rope_head_dim]``: normalised latent, then the
            key part that heads share.
        length: How many tokens are filled in.
    """

    latents: Tensor
    length: int = 0

    def append(self, latents: Tensor) -> Tensor:
        """Stores latents of new tokens ``[B, T, R]``; returns a view of those of all tokens."""
        end = self.length + latents.shape[1]
        if end > self.latents.shape[1]:
            raise ValueError(
                f"the decoding state has room for {self.latents.shape[1]} tokens (max_length) "
                f"and holds {self.length}; "
                f"{latents.shape[1]} more do not fit"
            )
        self.latents[:, self.length : end] = latents
        self.length = end
        return self.latents[:, :end]


class KimiMLAAttention(nn.Module):
    """One full-attention sublayer, ``[B, T, D] -> [B, T, D]``, with one latent a token.

    There is no positional encoding: the key part that other models rotate (``qk_rope_head_dim``
    wide, shared by the heads) is used as it is. Logits are scaled by ``(qk_nope_head_dim +
    qk_rope_head_dim)^-1/2``.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.num_heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim, self.value_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5
        query_channels = self.num_heads * (self.nope_dim + self.rope_dim)
        matrix = partial(Linear, deviation=config.initializer_range)
        if config.q_lora_rank is None:
            self.q_proj = matrix(config.hidden_size, query_channels)
        else:
            self.q_a_proj = matrix(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.q_b_proj = matrix(config.q_lora_rank, query_channels)
        self.kv_a_proj_with_mqa = matrix(config.hidden_size, self.rank + self.rope_dim)
        self.kv_a_layernorm = RMSNorm(self.rank, eps=_LATENT_NORM_EPS)
        self.kv_b_proj = matrix(self.rank, self.num_heads * (self.nope_dim + self.value_dim))
        if config.mla_use_output_gate:
            self.g_proj = matrix(config.hidden_size, self.num_heads * self.value_dim)
        self.o_proj = matrix(self.num_heads * self.value_dim, config.hidden_size)

    def reset_parameters(self) -> None:
        """Every part as it has it."""
        for part in self.children():
            part.reset_parameters()

    def new_state(
        self, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> KimiLatentState:
        """An empty latent cache for ``max_length`` tokens."""
        return KimiLatentState(
            torch.zeros(
                batch_size, max_length, self.rank + self.rope_dim, dtype=dtype, device=device
            )
        )

    def forward(
        self,
        x: Tensor,
        state: KimiLatentState | None = None,
        packing: Packing | Padding | None = None,
    ) -> Tensor:
        """Attends from each token to itself and all before it.

        Args:
            x: ``[B, T, D]``.
            state: Latent cache of the tokens before these, which are appended to it; None if there
                are none.
            packing: Where the sequences of one row lie, which do not attend to each other, not
                together with ``state``; or where rows are padded, which nobody attends to.

        Returns:
            ``[B, T, D]``.
        """
        queries = (
            self._queries(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        )  # [B, H, T, nope + rope]
        latent, shared_key = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope_dim], dim=-1)
        latents = torch.cat(
            [self.kv_a_layernorm(latent), shared_key], dim=-1
        )  # [B, T, rank + rope]
        starts_here = state is None or state.length == 0
        if state is not None:
            latents = state.append(latents)
        visible = None if packing is None else packing.visible
        attend = self._attend_expanded if starts_here else self._attend_latents
        out = attend(queries, latents, visible)
        out = out.transpose(1, 2).flatten(-2)  # [B, T, H * value]
        if hasattr(self, "g_proj"):
            out = out * self.g_proj(x).sigmoid()
        return self.o_proj(out)

    def _queries(self, x: Tensor) -> Tensor:
        if hasattr(self, "q_proj"):
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _attend_expanded(self, queries: Tensor, latents: Tensor, visible: Tensor | None) -> Tensor:
        """For whole sequences: keys and values of every head are made from the latents."""
        latent, shared_key = latents.split([self.rank, self.rope_dim], dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = expanded.split([self.nope_dim, self.value_dim], dim=-1)
        shared_key = shared_key.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        keys = torch.cat([keys, shared_key], dim=-1)
        return _attention(
            queries, keys, values, attn_mask=visible, is_causal=visible is None, scale=self.scale
        )

    def _attend_latents(self, queries: Tensor, latents: Tensor, visible: Tensor | None) -> Tensor:
        """For a few tokens after many: as ``q . W c = W^T q . c``, heads attend over latents.

        The cache is read as it lies, once for keys and values of all heads (DeepSeek-V2, §2.1.2,
        "absorbed" matrices).
        """
        weight = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, nope + value, rank]
        key_weight, value_weight = weight.split([self.nope_dim, self.value_dim], dim=1)
        queries, shared_queries = queries.split([self.nope_dim, self.rope_dim], dim=-1)
        queries = torch.cat(
            [queries @ key_weight, shared_queries], dim=-1
        )  # [B, H, T, rank + rope]
        tokens, length = queries.shape[2], latents.shape[1]
        if visible is None and tokens > 1:
            every = torch.ones(tokens, length, dtype=torch.bool, device=latents.device)
            visible = every.tril(length - tokens)
        keys = latents.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        out = _attention(queries, keys, keys[..., : self.rank], attn_mask=visible, scale=self.scale)
        return out @ value_weight.transpose(-1, -2)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """``F.scaled_dot_product_attention``; function transforms run its definition, since its kernels
    have no forward-mode derivative."""
    definition = sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext()
    with definition:
        return F.scaled_dot_product_attention(queries, keys, values, **options)
