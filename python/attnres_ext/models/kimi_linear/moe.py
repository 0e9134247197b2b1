"""Feed-forward sublayers: a gated network, and a mixture of them behind a sigmoid router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext.models.kimi_linear.configuration import KimiLinearConfig
from attnres_ext.models.kimi_linear.linear import Linear
from attnres_ext.torch_internals import is_transformed

__all__ = ["KimiExperts", "KimiMLP", "KimiRouter", "KimiSparseMoE", "has_grouped_products"]


class KimiMLP(nn.Module):
    """``down(silu(gate x) * up x)``, ``[..., D] -> [..., D]``.

    Args:
        hidden_size: ``D``.
        intermediate_size: Inner size.
        deviation: Standard deviation of what its matrices start from.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, deviation: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, deviation)
        self.up_proj = Linear(hidden_size, intermediate_size, deviation)
        self.down_proj = Linear(intermediate_size, hidden_size, deviation)

    def reset_parameters(self) -> None:
        """Draws its matrices."""
        for part in self.children():
            part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the network to each token of ``x`` ``[..., D]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KimiExperts(nn.Module):
    """The networks of :class:`KimiMLP`, one per expert, stacked: gate w1, up w3, down w2.

    Attributes:
        w1: ``[E, I, D]``.
        w2: ``[E, D, I]``.
        w3: ``[E, I, D]``.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, deviation: float
    ) -> None:
        super().__init__()
        self.deviation = deviation
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def reset_parameters(self) -> None:
        """Draws its matrices from N(0, deviation)."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.deviation)

    def forward(self, x: Tensor, load: Tensor) -> Tensor:
        """Sends rows through their experts.

        Args:
            x: ``[R, D]``, the rows of the first expert, then those of the second, and so on.
            load: ``[E]``, int64: how many rows each expert has.
        """
        return self.grouped(x, load) if _fits_grouped(x, self.w1) else self.one_by_one(x, load)

    def grouped(self, x: Tensor, load: Tensor) -> Tensor:
        """All experts in one product each way, in kernels that read where groups end: nothing
        waits for the device to say how many rows an expert has."""
        ends = load.cumsum(0, dtype=torch.int32)
        gate, up, down = (
            _differentiable(weight.to(x.dtype), load).transpose(-2, -1)
            for weight in (self.w1, self.w3, self.w2)
        )
        inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
        return F.grouped_mm(inner, down, offs=ends)

    def one_by_one(self, x: Tensor, load: Tensor) -> Tensor:
        """An expert's work is one slice of the rows and three matrix products."""
        counts = load.tolist()
        # A graph is for every load: no expert is left out of it.
        unknown = any(isinstance(count, torch.SymInt) for count in counts)
        outs = [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, gate, down, up in zip(
                x.split(counts),
                # Unbound together: their gradients are stacked once.
                self.w1.unbind(0),
                self.w2.unbind(0),
                self.w3.unbind(0),
                strict=True,
            )
            if unknown or rows.shape[0]
        ]
        return torch.cat(outs)


class _ZeroWithoutRows(torch.autograd.Function):
    """Identity; the gradient of an expert without rows is 0, whatever comes."""

    @staticmethod
    def forward(weight: Tensor, load: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (load,) = ctx.saved_tensors
        # Chosen, not multiplied: what was left unwritten may be NaN.
        return torch.where((load > 0)[:, None, None], gradient, 0), None


def _differentiable(weight: Tensor, load: Tensor) -> Tensor:
    """``weight`` ``[E, ..., ...]`` as grouped products with a ``load`` ``[E]`` may be given it."""
    return _ZeroWithoutRows.apply(weight, load) if _skips_empty_groups(weight.device) else weight


def _skips_empty_groups(device: torch.device) -> bool:
    """Whether grouped products leave the weight gradient of a group without rows unwritten: those
    for CUDA 10.x do (pytorch#172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def has_grouped_products(device: torch.device | str) -> bool:
    """Whether ``device`` has kernels for grouped matrix products: CUDA 9.0 and 10.x.

    Elsewhere PyTorch multiplies one group after the other, and has the host wait for the device to
    say how long they are.
    """
    device = torch.device(device)
    if device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _fits_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these: bfloat16, and rows that begin at multiples of 16 bytes."""
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    return x.dtype == torch.bfloat16 and aligned and has_grouped_products(x.device)


class KimiRouter(nn.Module):
    """Chooses experts by sigmoid scores and a bias that only the choice sees (DeepSeek-V3, §2.1.2).

    Attributes:
        weight: ``[E, D]``.
        e_score_correction_bias: ``[E]`` float32, no parameter: :meth:`update_bias` moves it.
        load: ``[E]`` float32, tokens sent to each expert and trained on since the last
            :meth:`update_bias`: they count when their gradient passes, in a module in training.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.top_k, self.renormalize = config.num_experts_per_token, config.moe_renormalize
        self.scaling_factor = config.routed_scaling_factor
        self.deviation = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32)
        )
        self.register_buffer(
            "load", torch.zeros(config.num_experts, dtype=torch.float32), persistent=False
        )

    def reset_parameters(self) -> None:
        """Draws the scores' matrix from N(0, deviation); no bias, nothing counted."""
        nn.init.normal_(self.weight, std=self.deviation)
        nn.init.zeros_(self.e_score_correction_bias)
        nn.init.zeros_(self.load)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts ``[M, k]`` (int64) and weights ``[M, k]`` (float32 or wider) of ``[M, D]``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Close scores must not tie because autocast rounds them.
        with torch.autocast(x.device.type, enabled=False):
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

        Call it once a training step, after the optimizer's; where replicas train together, when
        ``load`` is the sum of theirs (``KimiLinearForCausalLM.update_router_bias`` does both).
        """
        self.e_score_correction_bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class _CountedInBackward(torch.autograd.Function):
    """Hands ``x`` on, and adds ``load`` to ``total`` when the gradient of ``x`` passes.

    So tokens count once, when they are trained on: not in forwards without a backward, and not
    again when an activation checkpoint repeats the forward.
    """

    @staticmethod
    def forward(x: Tensor, load: Tensor, total: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, ctx.load, ctx.total = inputs

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.total += ctx.load
        return gradient, None, None


class _ToExperts(torch.autograd.Function):
    """``apply(tokens [M, D], order [M * k], inverse, k)`` -> ``[M * k, D]``: a row for each of a
    token's choices, in the order of experts.

    Backward a token gathers its rows' gradients and adds them up in float32, in the order of its
    choices. Autograd's own adds by index: on a GPU in any order, rounding each time.
    """

    @staticmethod
    def forward(tokens: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        _, _, inverse, ctx.top_k = inputs
        ctx.save_for_backward(inverse)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = gradient.index_select(0, inverse).unflatten(0, (-1, ctx.top_k))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return rows.sum(1, dtype=wide).to(gradient.dtype), None, None, None


class _ToTokens(torch.autograd.Function):
    """``apply(rows [M * k, D], order [M * k], inverse)``: rows in the order of tokens; the gradient
    of a permutation is gathered by its inverse."""

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(0, inverse)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class KimiSparseMoE(nn.Module):
    """Routed experts plus shared ones that see every token, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.moe_intermediate_size
        self.gate = KimiRouter(config)
        deviation = config.initializer_range
        self.experts = KimiExperts(config.num_experts, hidden, intermediate, deviation)
        self.shared_experts = (
            KimiMLP(hidden, intermediate * config.num_shared_experts, deviation)
            if config.num_shared_experts
            else None
        )

    def reset_parameters(self) -> None:
        """Router and experts, as each has it."""
        for part in self.children():
            part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Sends each token through its experts; no token is dropped.

        Tokens are sorted by expert, so that an expert's rows lie together.
        """
        tokens = x.flatten(0, -2)  # [M, D]
        experts, weights = self.gate(tokens)
        top_k = experts.shape[-1]
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)  # [M * k]: (token, choice) pairs, by expert
        load = torch.zeros_like(self.gate.load, dtype=torch.int64)
        load = load.scatter_add(0, chosen, torch.ones_like(chosen))
        places = torch.arange(order.numel(), device=order.device)
        inverse = torch.zeros_like(order).scatter(0, order, places)
        if is_transformed():
            # Nothing is trained, and what is gathered can be differentiated in any way.
            rows = self.experts(tokens.index_select(0, order // top_k), load)
            rows = rows.index_select(0, inverse)
        else:
            if self.training:
                weights = _CountedInBackward.apply(weights, load, self.gate.load)
            rows = self.experts(_ToExperts.apply(tokens, order, inverse, top_k), load)
            rows = _ToTokens.apply(rows, order, inverse)
        rows = rows.unflatten(0, (-1, top_k))  # [M, k, D]
        out = (weights.unsqueeze(-1) * rows).sum(1).to(x.dtype).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)
