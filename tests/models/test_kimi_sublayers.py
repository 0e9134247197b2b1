"""KDA, MLA and MoE sublayers: against plain formulas, and continued from a state."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attnres_ext.models.kimi_linear import moe, presets
from attnres_ext.models.kimi_linear.kda import KimiDeltaAttention
from attnres_ext.models.kimi_linear.mla import KimiMLAAttention
from attnres_ext.models.kimi_linear.moe import KimiExperts, KimiRouter, KimiSparseMoE


def make_config(linear=None, **changes):
    config = presets("tiny", **changes)
    for name, value in (linear or {}).items():
        setattr(config.linear_attn_config, name, value)
    return config.validate()


def initialised(module):
    torch.manual_seed(0)
    module.reset_parameters()
    for child in module.modules():
        if isinstance(child, torch.nn.Linear | KimiRouter):
            torch.nn.init.normal_(child.weight, std=0.3)
        elif isinstance(child, torch.nn.RMSNorm):
            torch.nn.init.uniform_(child.weight, 0.5, 1.5)
        elif isinstance(child, KimiExperts):
            for weight in child.parameters():
                torch.nn.init.normal_(weight, std=0.3)
    return module.double().eval()


def tokens(config, count=13, batch=2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, count, config.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def kda_by_definition(layer, x):
    """The sublayer of one sequence [T, D] as the report writes it (section 3, Eq. 10-12)."""

    def project(projection, convolution):
        y = projection(x)
        weight = convolution.weight[:, 0]  # [channels, taps]
        taps = weight.shape[-1]
        padded = F.pad(y, (0, 0, taps - 1, 0))
        y = torch.stack([(padded[t : t + taps] * weight.T).sum(0) for t in range(len(y))])
        return F.silu(y).unflatten(-1, (layer.num_heads, layer.head_dim))

    q, k, v = (project(getattr(layer, f"{n}_proj"), getattr(layer, f"{n}_conv1d")) for n in "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    z = layer.f_b_proj(layer.f_a_proj(x)) + layer.dt_bias
    z = z.unflatten(-1, (layer.num_heads, layer.head_dim))
    rate = layer.A_log.exp().unsqueeze(-1)
    bound = layer.gate_lower_bound
    g = -rate * F.softplus(z) if bound is None else bound * torch.sigmoid(rate * z)
    beta = layer.b_proj(x).sigmoid()
    out = torch.empty_like(v)
    for h in range(layer.num_heads):
        state = torch.zeros(layer.head_dim, layer.head_dim, dtype=x.dtype)
        for t in range(len(x)):
            state = g[t, h].exp().unsqueeze(-1) * state
            error = v[t, h] - state.T @ k[t, h]
            state = state + beta[t, h] * torch.outer(k[t, h], error)
            out[t, h] = state.T @ q[t, h] * layer.head_dim**-0.5
    norm = layer.o_norm
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    gate = layer.g_proj(x) if hasattr(layer, "g_proj") else layer.g_b_proj(layer.g_a_proj(x))
    return layer.o_proj(out.flatten(-2) * gate.sigmoid())


K3 = {"gate_lower_bound": -5.0, "use_full_rank_gate": True}


@pytest.mark.parametrize("linear", [{}, K3, {"short_conv_kernel_size": 1}], ids=str)
def test_kda_is_the_report_s(linear):
    config = make_config(linear)
    layer, x = initialised(KimiDeltaAttention(config)), tokens(config)
    expected = torch.stack([kda_by_definition(layer, sequence) for sequence in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-11)


def test_kda_initial_decays_lie_where_the_report_wants_them():
    config = make_config()
    layer = KimiDeltaAttention(config)
    layer.reset_parameters()
    rates = layer.A_log.exp()
    assert ((rates >= 1) & (rates <= 16)).all()
    steps = F.softplus(layer.dt_bias)
    assert ((steps > 0.99e-3) & (steps < 0.101)).all()
    bounded = KimiDeltaAttention(make_config(K3))
    bounded.reset_parameters()
    assert (bounded.A_log == 0).all()


@pytest.mark.parametrize("split", [[13], [1] * 13, [5, 1, 1, 6], [2, 3, 8]], ids=str)
@pytest.mark.parametrize("linear", [{}, {"short_conv_kernel_size": 1}], ids=str)
def test_kda_continues_from_its_state(split, linear):
    config = make_config(linear)
    layer, x = initialised(KimiDeltaAttention(config)), tokens(config)
    state = layer.new_state(2, x.dtype, x.device)
    with torch.no_grad():
        parts = [layer(part, state) for part in x.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-9, atol=1e-11)


def mla_by_definition(layer, x):
    """The sublayer of one sequence [T, D], head by head, with explicit softmax."""
    queries = layer._queries(x).unflatten(-1, (layer.num_heads, -1))
    latent, shared = layer.kv_a_proj_with_mqa(x).split([layer.rank, layer.rope_dim], dim=-1)
    norm = layer.kv_a_layernorm
    assert norm.eps == 1e-6
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    expanded = layer.kv_b_proj(latent).unflatten(-1, (layer.num_heads, -1))
    keys, values = expanded.split([layer.nope_dim, layer.value_dim], dim=-1)
    heads = []
    for h in range(layer.num_heads):
        key = torch.cat([keys[:, h], shared], dim=-1)
        logits = queries[:, h] @ key.T / key.shape[-1] ** 0.5
        logits = logits.masked_fill(~torch.ones_like(logits).bool().tril(), float("-inf"))
        heads.append(logits.softmax(-1) @ values[:, h])
    out = torch.cat(heads, dim=-1)
    if hasattr(layer, "g_proj"):
        out = out * layer.g_proj(x).sigmoid()
    return layer.o_proj(out)


MLA_VARIANTS = [{}, {"q_lora_rank": 6}, {"mla_use_output_gate": True}, {"qk_rope_head_dim": 0}]


@pytest.mark.parametrize("changes", MLA_VARIANTS, ids=str)
def test_mla_is_plain_attention_over_expanded_latents(changes):
    config = make_config(**changes)
    layer, x = initialised(KimiMLAAttention(config)), tokens(config)
    expected = torch.stack([mla_by_definition(layer, sequence) for sequence in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("split", [[13], [1] * 13, [5, 1, 1, 6]], ids=str)
@pytest.mark.parametrize("changes", MLA_VARIANTS, ids=str)
def test_mla_continues_from_its_latents(split, changes):
    config = make_config(**changes)
    layer, x = initialised(KimiMLAAttention(config)), tokens(config)
    state = layer.new_state(2, 13, x.dtype, x.device)
    with torch.no_grad():
        parts = [layer(part, state) for part in x.split(split, dim=1)]
        with pytest.raises(ValueError, match="room for 13 tokens"):
            layer(x[:, :1], state)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-9, atol=1e-11)


def moe_by_definition(layer, x):
    """Token by token: the k best of score + bias, weighted by score (section 4)."""
    router, out = layer.gate, []
    for token in x:
        scores = (router.weight @ token).sigmoid()
        chosen = (scores + router.e_score_correction_bias).argsort(descending=True)[: router.top_k]
        weights = scores[chosen] / (scores[chosen].sum() + 1e-20) * router.scaling_factor
        mix = layer.shared_experts(token) if layer.shared_experts is not None else 0
        for index, weight in zip(chosen.tolist(), weights, strict=True):
            w1, w2, w3 = (w[index] for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
            mix = mix + weight * (w2 @ (F.silu(w1 @ token) * (w3 @ token)))
        out.append(mix)
    return torch.stack(out)


@pytest.mark.parametrize("changes", [{}, {"num_shared_experts": 0}, {"num_experts_per_token": 4}])
def test_moe_is_token_by_token_routing(changes):
    config = make_config(**changes)
    layer, x = initialised(KimiSparseMoE(config)), tokens(config).requires_grad_()
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1]))
    expected = torch.stack([moe_by_definition(layer, sequence) for sequence in x])
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    parameters = [x, *layer.parameters()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    actual = torch.autograd.grad((out * weight).sum(), parameters)
    for a, e in zip(
        actual, torch.autograd.grad((expected * weight).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_moe_experts_without_tokens_cost_and_break_nothing():
    config = make_config(num_experts_per_token=1)
    layer, x = initialised(KimiSparseMoE(config)), tokens(config)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 10.0, 0.0]))
    layer(x).sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad[2].abs().max() > 0
        assert weight.grad[[0, 1, 3]].abs().max() == 0


@pytest.mark.parametrize("favourite", [None, 0, 3])
def test_grouped_products_are_those_of_each_expert(favourite):
    """The bodies for CUDA, in PyTorch's grouped product for the CPU; some groups are empty."""
    config = make_config()
    layer = initialised(KimiSparseMoE(config)).float()
    if favourite is not None:
        layer.gate.e_score_correction_bias[favourite] = 10
    x = tokens(config).float()
    with torch.no_grad():
        chosen = layer.gate(x.flatten(0, 1))[0].flatten()
    load = torch.bincount(chosen, minlength=config.num_experts)
    weight = torch.randn(int(load.sum()), config.hidden_size)
    results = []
    for body in (layer.experts.one_by_one, layer.experts.grouped):
        rows = torch.linspace(-1, 1, weight.numel()).view_as(weight).requires_grad_()
        out = body(rows, load)
        inputs = [rows, *layer.experts.parameters()]
        results.append([out, *torch.autograd.grad(out, inputs, weight)])
    for actual, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=64 * 2**-24 * scale)


class Unwritten(torch.autograd.Function):
    """A weight whose gradient is garbage where an expert has no rows, as grouped products leave it
    on some devices."""

    @staticmethod
    def forward(ctx, weight, load):
        ctx.load = load
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.load == 0] = torch.nan
        return gradient, None


def test_gradients_that_nobody_wrote_are_zero(monkeypatch):
    layer = initialised(KimiSparseMoE(make_config())).float()
    load = torch.tensor([3, 0, 5, 0])
    product = F.grouped_mm
    monkeypatch.setattr(moe, "_skips_empty_groups", lambda device: True)
    monkeypatch.setattr(
        F,
        "grouped_mm",
        lambda x, w, offs: product(x, Unwritten.apply(w, load), offs=offs),
    )
    rows = torch.randn(8, make_config().hidden_size)
    layer.experts.grouped(rows, load).backward(torch.randn_like(rows))
    for weight in layer.experts.parameters():
        assert weight.grad.isfinite().all()
        assert [bool(expert.any()) for expert in weight.grad] == [True, False, True, False]


@pytest.mark.parametrize(
    ("capability", "has", "skips"),
    [((8, 0), 0, 0), ((8, 9), 0, 0), ((9, 0), 1, 0), ((10, 3), 1, 1), ((12, 0), 0, 0)],
)
def test_devices_of_grouped_products(capability, has, skips, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert moe.has_grouped_products("cuda") == has
    assert moe._skips_empty_groups(torch.device("cuda")) == skips
    assert not moe.has_grouped_products("cpu")


def test_a_token_s_gradient_is_summed_wide_and_in_the_order_of_its_choices():
    """In bfloat16, where each rounding in between would show."""
    tokens, top_k = 5, 3
    order = torch.randperm(tokens * top_k)
    inverse = order.argsort()
    x = torch.randn(tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    rows = moe._ToExperts.apply(x, order, inverse, top_k)
    assert torch.equal(rows, x[order // top_k])
    back = moe._ToTokens.apply(rows, order, inverse)
    assert torch.equal(back, x.repeat_interleave(top_k, 0))
    gradient = torch.randn(tokens * top_k, 8, dtype=torch.bfloat16)
    back.backward(gradient)
    wide = gradient.float().view(tokens, top_k, 8)
    assert torch.equal(x.grad, (wide[:, 0] + wide[:, 1] + wide[:, 2]).bfloat16())


def test_router_bias_moves_load_towards_balance():
    config = make_config()
    layer, x = initialised(KimiSparseMoE(config)).train(), tokens(config, count=200)

    def spread():
        layer.gate.load.zero_()
        layer(x).sum().backward()
        return (layer.gate.load.max() - layer.gate.load.min()).item()

    layer.gate.weight.data[0] += 0.2 * x.mean((0, 1)).sign()
    first = spread()
    assert layer.gate.load.sum() == x.shape[0] * x.shape[1] * config.num_experts_per_token
    for _ in range(60):
        layer(x).sum().backward()
        layer.gate.update_bias(0.01)
    assert spread() < first / 2


def test_router_counts_what_is_trained_once():
    config = make_config()
    layer, x = initialised(KimiSparseMoE(config)).train(), tokens(config, count=50)

    def counted():
        count = layer.gate.load.sum().item() / config.num_experts_per_token
        layer.gate.load.zero_()
        return count

    layer(x).sum().backward()
    once = counted()
    assert once == x.shape[:-1].numel()
    # Repeated by an activation checkpoint, of either kind.
    for reentrant in (False, True):
        checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert counted() == once
    # A forward that nothing is trained on.
    with torch.no_grad():
        layer(x)
    layer(x)
    layer.eval()(x).sum().backward()
    assert counted() == 0
    # Compiled, where shapes do not depend on where tokens are sent.
    layer.train().gate.compile(backend="aot_eager", fullgraph=True)
    layer(x).sum().backward()
    assert counted() == once
