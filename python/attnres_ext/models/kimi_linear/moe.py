"""Feed-forward sublayers: a gated network, and a mixture of them behind a sigmoid router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.linear import Linear

__all__ = ["KimiMLP", "KimiRouter", "KimiSparseMoE"]


class KimiMLP(nn.Module):
    """``down(silu(gate x) * up x)``, ``[..., D] -> [..., D]``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the network to each token of ``x`` ``[..., D]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KimiExpert(nn.Module):
    """The network of :class:`KimiMLP` under experts' names: gate w1, up w3, down w2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, intermediate_size)
        self.w2 = Linear(intermediate_size, hidden_size)
        self.w3 = Linear(hidden_size, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the network to each token of ``x`` ``[M, D]``."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class KimiRouter(nn.Module):
    """Chooses experts by sigmoid scores and a bias that only the choice sees (DeepSeek-V3, §2.1.2).

    Attributes:
        weight: ``[E, D]``.
        e_score_correction_bias: ``[E]`` float32, no parameter: :meth:`update_bias` moves it.
        load: ``[E]``, tokens sent to each expert while training since the last :meth:`update_bias`.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.top_k, self.renormalize = config.num_experts_per_token, config.moe_renormalize
        self.scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32)
        )
        self.register_buffer(
            "load", torch.zeros(config.num_experts, dtype=torch.float32), persistent=False
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts ``[M, k]`` (int64) and weights ``[M, k]`` (float32 or wider) of ``[M, D]``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(dtype), self.weight.to(dtype)).sigmoid()
        experts = (
            (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1, sorted=False).indices
        )
        weights = scores.gather(-1, experts)
        if self.renormalize and self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling_factor

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """Makes experts above the mean load less eligible, and those below more, by ``rate``.

        Call it once a training step, after the optimizer's.
        """
        self.e_score_correction_bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class KimiSparseMoE(nn.Module):
    """Routed experts plus shared ones that see every token, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        self.gate = KimiRouter(config)
        self.experts = nn.ModuleList(
            KimiExpert(hidden, intermediate) for _ in range(config.num_experts)
        )
        self.shared_experts = (
            KimiMLP(hidden, intermediate * config.num_shared_experts)
            if config.num_shared_experts
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sends each token through its experts; no token is dropped.

        Tokens are sorted by expert, so that an expert's work is one slice and three matrix
        products.
        """
        tokens = x.flatten(0, -2)  # [M, D]
        experts, weights = self.gate(tokens)
        top_k = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)  # [M * k]: (token, choice) pairs, by expert
        load = torch.bincount(experts.flatten(), minlength=len(self.experts))
        if self.training:
            self.gate.load += load
        counts = load.tolist()
        gathered = tokens.index_select(0, order // top_k).split(counts)
        outs = [
            expert(part)
            for expert, part in zip(self.experts, gathered, strict=True)
            if part.shape[0]
        ]
        # Back to token order by the inverse permutation: a gather, where adding by index would have
        # to be in order.
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        chosen = torch.cat(outs).index_select(0, inverse).unflatten(0, (-1, top_k))  # [M, k, D]
        out = (weights.unsqueeze(-1) * chosen).sum(1).to(x.dtype).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)
