"""The gated delta rule of Kimi Delta Attention: by chunks to train, by tokens to decode.

Per head and token (Kimi Linear report, §3; ``S`` is the state ``[K, V]``, ``g <= 0`` the log-decay
of each key channel):

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t / sqrt(K)

Shapes: ``B`` batch, ``T`` tokens, ``H`` heads, ``K`` key channels, ``V`` value channels, ``n``
chunks of ``C`` tokens.

**Safe decays.** The chunkwise form needs ``sum_d q_c k_i exp(g_{i+1} + ... + g_c)`` per channel for
every pair ``i <= c`` of a chunk. Splitting the exponential into ``exp(G_c) exp(-G_i)`` makes it a
matrix product, but ``exp(-G_i)`` overflows as soon as a channel forgets more than ``e^88`` within
the chunk. Here each pair is split at a boundary that lies *between* its tokens: the chunk is halved
again and again, and at half size ``s`` the tokens after a block's middle meet those before it,

    exp(g_{i+1} + ... + g_mid) * exp(g_{mid+1} + ... + g_c),

so both exponents are sums of non-positive numbers: nothing overflows for any gate, and as no two
cumulative sums are subtracted, an exponent ``x`` carries a relative error of at most ``C``
roundings. The absolute error of a decay is then at most ``C ulp max|x e^x| = C ulp / e``, however
strong the gate. log2(C) levels of matrix products cover all pairs once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chunk_gated_delta_rule", "forget_before", "recurrent_gated_delta_rule"]

# exp() of it is 0 in every dtype, and sums of it are far from overflow.
_FORGOTTEN = -1e4


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token after another: what a decoder runs.

    Args:
        q: Queries ``[B, T, H, K]``, normalised by the caller; scaled by ``K^-1/2`` here.
        k: Keys ``[B, T, H, K]``, normalised by the caller.
        v: Values ``[B, T, H, V]``.
        g: Log-decay of each key channel ``[B, T, H, K]``, at most 0.
        beta: Writing strength ``[B, T, H]`` in (0, 1).
        state: State before the first token ``[B, H, K, V]``; None is zeros.

    Returns:
        Outputs ``[B, T, H, V]`` and the state after the last token ``[B, H, K, V]``. All in the
        dtype of the arguments, which must agree; float32 or float64.
    """
    if state is None:
        state = _zero_state(k, v)
    q, decay, outputs = q * q.shape[-1] ** -0.5, g.exp(), []
    for t in range(q.shape[1]):
        state = state * decay[:, t].unsqueeze(-1)
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        write = error * beta[:, t].unsqueeze(-1)
        state = state + k[:, t].unsqueeze(-1) * write.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same map in chunkwise form: matrix products over all chunks at once.

    Within a chunk the writes ``beta_c (v_c - S^T k_c)`` depend on one another through a unit lower
    triangular system; it is solved for all chunks together with the state left open (``W``: what
    the chunk reads of the incoming state, ``U``: what it writes regardless). Only the state's own
    recurrence runs over chunks one by one (Kimi Linear report, §3.1).

    Args:
        q: Queries ``[B, T, H, K]``, normalised by the caller; scaled by ``K^-1/2`` here.
        k: Keys ``[B, T, H, K]``, normalised by the caller.
        v: Values ``[B, T, H, V]``.
        g: Log-decay of each key channel ``[B, T, H, K]``, finite and at most 0.
        beta: Writing strength ``[B, T, H]`` in (0, 1).
        state: State before the first token ``[B, H, K, V]``; None is zeros.
        chunk_size: Tokens of a chunk, a power of two. ``T`` need not be a multiple.

    Returns:
        Outputs ``[B, T, H, V]`` and the state after the last token ``[B, H, K, V]``.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}, expected a power of two")
    tokens, key_dim = q.shape[1], q.shape[-1]
    while chunk_size > 1 and chunk_size >= 2 * tokens:
        chunk_size //= 2
    # Tokens of padding neither decay the state (g = 0) nor write to it (beta = 0).
    # [B, H, n, C, K], values [B, H, n, C, V].
    q, k, v, g = (_split(x, chunk_size) for x in (q * key_dim**-0.5, k, v, g))
    beta = _split(beta.unsqueeze(-1), chunk_size)  # [B, H, n, C, 1]

    attention, similarity = _ChunkScores.apply(q, k, g)  # [B, H, n, C, C] each
    until, after = _prefix_masks(chunk_size, g.dtype, g.device)
    decay_in = (until @ g).exp()  # from the chunk's start up to and including the token
    decay_out = (after @ g).exp()  # from after the token to the chunk's end
    decay_chunk = decay_in[..., -1, :].unsqueeze(-1)  # [B, H, n, K, 1]
    solved = torch.linalg.solve_triangular(
        beta * similarity,
        beta * torch.cat([decay_in * k, v], dim=-1),
        upper=False,
        unitriangular=True,
    )
    # W [B, H, n, C, K] and U [B, H, n, C, V].
    reads, writes = solved.split([key_dim, v.shape[-1]], dim=-1)
    keys_out = (decay_out * k).transpose(-1, -2)  # [B, H, n, K, C]

    if state is None:
        state = _zero_state(k.transpose(1, 2), v.transpose(1, 2))
    states, deltas = [], []
    for read, write, key_out, decay in zip(
        reads.unbind(2), writes.unbind(2), keys_out.unbind(2), decay_chunk.unbind(2), strict=True
    ):
        delta = write - read @ state
        states.append(state)
        deltas.append(delta)
        state = decay * state + key_out @ delta
    out = (decay_in * q) @ torch.stack(states, dim=2) + attention @ torch.stack(deltas, dim=2)
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens], state


def forget_before(g: Tensor, begins: Tensor) -> Tensor:
    """Log-decays ``[B, T, H, K]`` with which the state is empty before each token that begins a
    sequence (``begins`` ``[T]``, bool).

    Exactly empty: an exponent reaches over such a token or it does not, none is a difference of two
    that do.
    """
    return g.masked_fill(begins[:, None, None], _FORGOTTEN)


class _ChunkScores(torch.autograd.Function):
    """Decayed inner products within each chunk, ``[..., C, K] -> [..., C, C]``, by halving.

    Returns ``sum_d q_c k_i e^{g_{i+1..c}}`` for ``i <= c`` and ``sum_d k_c k_i e^{g_{i+1..c}}`` for
    ``i < c``, zeros above. Its own backward, because autograd's would keep the decays of every
    level and add full-size gradients level by level: here only the inputs are kept and a level's
    gradient is two matrix products.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, g)
        shape, (chunk, key_dim) = g.shape[:-2], g.shape[-2:]
        q, k, g = (x.reshape(-1, chunk, key_dim) for x in (q, k, g))
        scores = q.new_zeros(2, q.shape[0], chunk, chunk)
        scores[0].diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        half = chunk // 2
        while half:
            left, right, _ = _level(q, k, g, half)
            product = left @ right.transpose(
                -1, -2
            )  # [M * C/2s, 2s, s], queries' rows above keys' rows
            _cross(scores, half).copy_(
                product.view(-1, chunk // (2 * half), 2, half, half).permute(2, 0, 3, 4, 1)
            )
            half //= 2
        return scores[0].view(*shape, chunk, chunk), scores[1].view(*shape, chunk, chunk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx, grad_attention: Tensor, grad_similarity: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, g = ctx.saved_tensors
        shape, (chunk, key_dim) = g.shape, g.shape[-2:]
        q, k, g = (x.reshape(-1, chunk, key_dim) for x in (q, k, g))
        grads = torch.stack(
            [x.reshape(-1, chunk, chunk) for x in (grad_attention, grad_similarity)]
        )
        diagonal = grads[0].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        grad_q, grad_k, grad_g = diagonal * k, diagonal * q, torch.zeros_like(g)
        half = chunk // 2
        while half:
            blocks = chunk // (2 * half)
            left, right, decay = _level(q, k, g, half)
            grad = _cross(grads, half).permute(1, 4, 0, 2, 3).reshape(-1, 2 * half, half)
            # Gradients of the decayed factors; times the factor they are the gradients of the
            # exponents.
            grad_left = _product(grad, right).view(-1, blocks, 2, half, key_dim)
            grad_right = _product(grad.transpose(-1, -2), left).view(-1, blocks, half, key_dim)
            left, right = left.view_as(grad_left), right.view_as(grad_right)
            exponent = _two_products(grad_right, right, grad_left[:, :, 0], left[:, :, 0])
            exponent[:, :, 1].addcmul_(grad_left[:, :, 1], left[:, :, 1])
            mask = _level_mask(chunk, half, g.dtype, g.device).mT
            grad_g.baddbmm_(mask.expand(g.shape[0], -1, -1), exponent.view_as(g))
            before, behind = decay.unbind(2)
            _halves(grad_q, half)[1].addcmul_(grad_left[:, :, 0], behind)
            _halves(grad_k, half)[1].addcmul_(grad_left[:, :, 1], behind)
            _halves(grad_k, half)[0].addcmul_(grad_right, before)
            half //= 2
        return grad_q.view(shape), grad_k.view(shape), grad_g.view(shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for a great many matrices; where they are tiny, outer products beat bmm."""
    inner = a.shape[-1]
    if inner > 4:
        return a @ b
    out = a[..., :1] * b[..., :1, :]
    for i in range(1, inner):
        out.addcmul_(a[..., i : i + 1], b[..., i : i + 1, :])
    return out


def _level(q: Tensor, k: Tensor, g: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """One level's rows ``[M * C/2s, 2s, K]``, columns ``[M * C/2s, s, K]`` and decays."""
    chunk, key_dim = g.shape[-2:]
    decay = (
        (_level_mask(chunk, half, g.dtype, g.device) @ g)
        .exp_()
        .view(-1, chunk // (2 * half), 2, half, key_dim)
    )
    before, behind = decay.unbind(2)
    rows = _two_products(_halves(q, half)[1], behind, _halves(k, half)[1], behind)
    columns = _halves(k, half)[0] * before
    return rows.view(-1, 2 * half, key_dim), columns.view(-1, half, key_dim), decay


def _two_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``a * b`` and ``c * d`` in turn along a new dimension 2."""
    if torch.compiler.is_compiling():  # a graph takes no result that is a part of another tensor
        return torch.stack((a * b, c * d), dim=2)
    out = a.new_empty((*a.shape[:2], 2, *a.shape[2:]))
    torch.mul(a, b, out=out[:, :, 0])
    torch.mul(c, d, out=out[:, :, 1])
    return out


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of ``[M, C, K]``: tokens before and after each block's middle, ``[M, C/2s, s, K]``."""
    return x.view(x.shape[0], -1, 2, half, x.shape[-1]).unbind(2)


def _cross(scores: Tensor, half: int) -> Tensor:
    """View of ``[2, M, C, C]``: each diagonal block's lower left quarter ``[2, M, s, s, C/2s]``."""
    blocks = scores.shape[-1] // (2 * half)
    tiles = scores.unflatten(-1, (blocks, 2 * half)).unflatten(-3, (blocks, 2 * half))
    return tiles.diagonal(dim1=2, dim2=4)[:, :, half:, :half]


# Made anew at each call: a kept one could come from a trace or a captured graph, whose tensors are
# nobody else's.
def _level_mask(chunk: int, half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0/1 matrix ``[C, C]``: sums from each token to the middle of its block of ``2 * half``."""
    token = torch.arange(chunk, device=device)
    middle = (token | (2 * half - 1)) - half  # the last token before it
    after, until = torch.minimum(token, middle), torch.maximum(token, middle)
    return ((token > after.unsqueeze(-1)) & (token <= until.unsqueeze(-1))).to(dtype)


def _prefix_masks(chunk: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """0/1 matrices ``[C, C]`` that sum up to and including each token, and after it."""
    until = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    return until.to(dtype), (~until).to(dtype)


def _split(x: Tensor, chunk: int) -> Tensor:
    """``[B, T, H, K] -> [B, H, n, C, K]``, padded with zeros to whole chunks."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _zero_state(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[-1], v.shape[-1])
