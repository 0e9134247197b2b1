"""The gated delta rule: both forms against a plain float64 loop, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from attnres_ext.models.kimi_linear.delta_rule import (
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
)

NAMES = ("q", "k", "v", "g", "beta", "state")


def make_inputs(tokens, *, key_dim=8, value_dim=6, heads=2, batch=2, decay=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, tokens, heads)
    return [
        F.normalize(randn(*shape, key_dim), dim=-1),
        F.normalize(randn(*shape, key_dim), dim=-1),
        randn(*shape, value_dim),
        -decay * F.softplus(randn(*shape, key_dim)),
        randn(*shape).sigmoid(),
        randn(batch, heads, key_dim, value_dim),
    ]


def by_definition(q, k, v, g, beta, state):
    """S_t = (I - beta k k^T) Diag(e^g) S_{t-1} + beta k v^T; o_t = S_t^T q_t / sqrt(K)."""
    out = torch.empty_like(v)
    states = torch.empty_like(state)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            memory = state[b, h]
            for t in range(q.shape[1]):
                key = k[b, t, h]
                erase = torch.eye(len(key), dtype=q.dtype) - beta[b, t, h] * torch.outer(key, key)
                memory = erase @ torch.diag(g[b, t, h].exp()) @ memory
                memory = memory + beta[b, t, h] * torch.outer(key, v[b, t, h])
                out[b, t, h] = memory.T @ q[b, t, h] / len(key) ** 0.5
            states[b, h] = memory
    return out, states


def values_and_gradients(function, inputs, **kwargs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out, state = function(*inputs, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weight).sum() + state.square().sum()
    return out, state, *torch.autograd.grad(loss, inputs)


def test_recurrent_is_the_definition():
    inputs = make_inputs(5)
    out, state = recurrent_gated_delta_rule(*inputs)
    expected_out, expected_state = by_definition(*inputs)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.05, 1.0, 30.0])
@pytest.mark.parametrize(
    ("tokens", "chunk_size"), [(1, 16), (5, 4), (16, 16), (17, 16), (37, 8), (61, 32), (9, 1)]
)
def test_chunkwise_equals_recurrent(tokens, chunk_size, decay):
    inputs = make_inputs(tokens, decay=decay)
    expected = values_and_gradients(recurrent_gated_delta_rule, inputs)
    actual = values_and_gradients(chunk_gated_delta_rule, inputs, chunk_size=chunk_size)
    for name, a, e in zip(("out", "new state", *NAMES), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(6, key_dim=3, value_dim=2, heads=1, batch=1)]
    assert torch.autograd.gradcheck(lambda *x: chunk_gated_delta_rule(*x, chunk_size=4), inputs)


@pytest.mark.parametrize("decay", [1.0, 100.0, 1e4])
def test_strong_and_uneven_decay_neither_overflows_nor_loses_accuracy(decay):
    """Channels that forget e^-decay at one token and nothing at others: exp(-sum) overflows."""
    inputs = make_inputs(64)
    g = torch.zeros_like(inputs[3])
    g[:, 3::7] = -decay
    g[:, :, :, ::2] = -1e-3
    inputs[3] = g
    expected = values_and_gradients(recurrent_gated_delta_rule, inputs)
    actual = values_and_gradients(
        chunk_gated_delta_rule, [x.float() for x in inputs], chunk_size=64
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        # Some hundred float32 operations between input and result, on values of the size of e.
        torch.testing.assert_close(a.double(), e, rtol=0, atol=3e-6 * e.abs().max().item())


def test_state_is_carried_across_calls():
    *inputs, state = make_inputs(41)
    whole, final = chunk_gated_delta_rule(*inputs, state, chunk_size=16)
    parts = []
    for piece in zip(*(x.split([7, 20, 1, 13], dim=1) for x in inputs), strict=True):
        out, state = chunk_gated_delta_rule(*piece, state, chunk_size=16)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-12)


def test_no_state_is_a_state_of_zeros():
    *inputs, state = make_inputs(11)
    for function in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        out, _ = function(*inputs)
        expected, _ = function(*inputs, torch.zeros_like(state))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_chunk_size_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="chunk_size is 24, expected a power of two"):
        chunk_gated_delta_rule(*make_inputs(3), chunk_size=24)


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use():
    inputs = make_inputs(12)
    with torch.inference_mode():
        chunk_gated_delta_rule(*inputs)
    values_and_gradients(chunk_gated_delta_rule, inputs)
