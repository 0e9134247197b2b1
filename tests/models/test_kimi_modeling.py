"""The model as a whole: first loss, training, decoding, generation."""

import copy
import dataclasses

import pytest
import torch
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard

from attnres_ext.models.kimi_linear import KimiLinearForCausalLM, presets

MODES = ("standard", "block", "full")


def make_model(mode, *, queries=0.0, seed=0, **changes):
    """A tiny float64 model; ``queries`` is the spread of its pseudo-queries, which start at 0."""
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(presets("tiny", residual=mode, **changes)).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for query, gain in zip(model.residual.queries, model.residual.key_weights, strict=True):
            noise = torch.randn(query.shape, generator=generator, dtype=query.dtype)
            query.add_(queries * noise)
            gain.add_(queries * noise.roll(1))
    return model


def make_ids(batch=2, tokens=21, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, tokens), generator=generator)


@pytest.mark.parametrize("sublayers_per_block", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_first_loss_is_the_standard_residual_s(mode, sublayers_per_block):
    """Zero queries read means, a standard residual sums; the RMSNorm that follows removes the 1/n.

    All but its epsilon, which is why it is tiny here.
    """
    changes = {"rms_norm_eps": 1e-30, "sublayers_per_block": sublayers_per_block}
    ids = make_ids()
    standard, attention = make_model("standard", **changes), make_model(mode, **changes)
    shared = dict(standard.named_parameters())
    extra = [name for name, _ in attention.named_parameters() if name not in shared]
    assert all(name.startswith("model.residual.") for name in extra)
    for name, parameter in attention.named_parameters():
        assert name not in shared or torch.equal(parameter, shared[name])
    expected, actual = (model(ids, labels=ids).loss for model in (standard, attention))
    # Means and sums of at most 9 sources, rounded once per sublayer.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_decoding_equals_the_full_forward(mode):
    model, ids = make_model(mode, queries=0.3).eval(), make_ids()
    full = model(ids).logits
    state = model.new_state(2, ids.shape[1])
    parts = []
    for part in ids.split([9, 1, 1, 1, 4, 1, 1, 3], dim=1):
        output = model(part, state=state)
        assert output.state is state
        assert not output.logits.requires_grad
        parts.append(output.logits)
    assert state.length == ids.shape[1]
    # The block cache keeps reciprocal norms of blocks in float32, whatever the dtype.
    rtol = 1e-9 if mode == "standard" else 1e-6
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_generation_is_the_full_forward_s_choice(mode):
    model, ids = make_model(mode, queries=0.3).eval(), make_ids(tokens=5)
    produced = list(model.generate(ids, 6))
    assert [token.shape for token in produced] == [(2,)] * 6
    for token in produced:
        expected = model(ids, logits_to_keep=1).logits[:, -1].argmax(-1)
        assert torch.equal(token, expected)
        ids = torch.cat([ids, token.unsqueeze(-1)], dim=1)


def test_sampling_follows_the_generator():
    model, ids = make_model("block", queries=0.3).eval(), make_ids(batch=1, tokens=4)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(model.generate(ids, 12, 1.5, generator))).flatten().tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert list(model.generate(ids, 0)) == []
    with pytest.raises(ValueError, match="temperature is -1"):
        next(model.generate(ids, 1, -1))


def test_generation_is_lazy():
    model, ids = make_model("standard").eval(), make_ids(batch=1, tokens=4)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(None))
    tokens = model.generate(ids, 100)
    next(tokens)
    next(tokens)
    assert len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
def test_training_lowers_the_loss_and_moves_every_parameter(mode):
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(presets("tiny", residual=mode, sublayers_per_block=3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = (torch.arange(48) * 7 % 31).repeat(4, 1) + torch.arange(4).unsqueeze(-1)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    # The first site has one source, whatever its query; site 1 has two blocks, or one more.
    assert still <= {"model.residual.queries.0", "model.residual.key_weights.0"}


def test_labels_are_shifted_and_may_be_ignored():
    model, ids = make_model("block"), make_ids()
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    labels = ids.clone()
    labels[:, 4:] = -100
    expected = model(ids[:, :4], labels=ids[:, :4]).loss
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_no_position_sees_later_tokens():
    model, ids = make_model("block", queries=0.3), make_ids()
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 256
    first, second = model(ids).logits, model(changed).logits
    torch.testing.assert_close(first[:, :11], second[:, :11], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(first[:, 11:], second[:, 11:])


def test_bfloat16_model_runs_and_stays_near():
    model, ids = make_model("block", queries=0.3).eval(), make_ids()
    expected = model(ids).logits
    model.bfloat16()
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    # 8 bits of mantissa through some 60 roundings in a row.
    assert (logits.double() - expected).abs().max() < 60 * 2**-9 * expected.abs().max()
    state = model.new_state(2, 21)
    assert torch.isfinite(model(ids, state=state).logits).all()


def test_tied_embeddings_share_one_matrix():
    model = make_model("standard", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_initial_values():
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(presets("tiny", hidden_size=64))
    for name, parameter in model.named_parameters():
        if "norm" in name or "key_weights" in name:
            assert (parameter == 1).all(), name
        elif "queries" in name:
            assert (parameter == 0).all(), name
        elif "_proj" in name or "embed" in name or "experts" in name or "lm_head" in name:
            assert abs(parameter.std().item() / 0.02 - 1) < 0.15, name


def test_misuse_gives_sentences():
    model, ids = make_model("block"), make_ids()
    with pytest.raises(ValueError, match=r"input_ids has shape \(21,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="at least one each"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="labels has shape"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="labels need at least two tokens"):
        model(ids[:, :1], labels=ids[:, :1])
    with pytest.raises(ValueError, match="leave logits_to_keep at None"):
        model(ids, labels=ids, logits_to_keep=2)
    with pytest.raises(ValueError, match="logits_to_keep is 0"):
        model(ids, logits_to_keep=0)
    with pytest.raises(ValueError, match="both must be at least 1"):
        model.new_state(0, 4)
    state = model.new_state(2, 20)
    with pytest.raises(ValueError, match="has seen 0; 21 more do not fit"):
        model(ids, state=state)
    with pytest.raises(ValueError, match="the state was made for batch_size 2"):
        model(ids[:1, :3], state=state)
    assert state.length == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 21, 50])
def test_prefill_in_chunks_equals_prefill_at_once(mode, chunk_size):
    model, ids = make_model(mode, queries=0.3).eval(), make_ids()
    whole, chunked = (model.new_state(2, 24) for _ in range(2))
    expected = model(ids, state=whole, logits_to_keep=1).logits[:, -1]
    actual = model.prefill(ids, chunked, chunk_size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert chunked.length == 21
    assert chunked.prefill_cache is None
    # What follows has seen the same.
    after = [model(ids[:, :1], state=state).logits for state in (whole, chunked)]
    torch.testing.assert_close(after[1], after[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_chunks_bound_the_memory_of_blocks(mode, monkeypatch):
    model = make_model(mode).eval()
    made = []
    new_cache = model.residual.new_cache
    monkeypatch.setattr(
        model.residual, "new_cache", lambda *a, **k: made.append(new_cache(*a, **k)) or made[-1]
    )

    def blocks_bytes(tokens, chunk_size):
        state = model.new_state(2, tokens)
        made.clear()
        model.prefill(make_ids(tokens=tokens), state, chunk_size)
        return sum(cache._slots.nbytes for cache in made)

    slot = 2 * model.config.hidden_size * 8  # bytes of a token of both sequences
    capacity = model.residual.num_blocks + 1
    for tokens in (9, 30, 61):
        assert blocks_bytes(tokens, 8) == capacity * 8 * slot
        assert blocks_bytes(tokens, 1000) == capacity * tokens * slot


def test_prefill_refuses():
    model, ids = make_model("block"), make_ids()
    with pytest.raises(ValueError, match="chunk_size is 0, expected at least 1"):
        model.prefill(ids, model.new_state(2, 21), 0)
    state = model.new_state(2, 20)
    with pytest.raises(ValueError, match="21 more do not fit"):
        model.prefill(ids, state, 4)
    assert state.length == 0, "nothing of it is taken in"


def gradients_of(model, ids):
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_layers_compiled_one_by_one():
    """A graph for the first layer, and one for each kind of the others."""
    torch._dynamo.reset()
    tiny = presets("tiny")
    attention = dataclasses.replace(
        tiny.linear_attn_config, kda_layers=[1, 2, 4, 5], full_attn_layers=[3, 6], chunk_size=4
    )
    model = make_model(
        "block", queries=0.3, num_hidden_layers=6, linear_attn_config=attention, num_experts=None
    )
    ids = make_ids(tokens=8)
    expected = gradients_of(model, ids)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    found = gradients_of(model, ids)
    torch._dynamo.reset()
    assert counter.frame_count == 3
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_layers_have_the_same_gradients(recompute):
    """A layer is a module that is called: parameters are gathered and freed around it."""
    model, ids = make_model("block", queries=0.3), make_ids()
    sharded = copy.deepcopy(model)
    sharded.model.checkpoint_sublayers = recompute
    expected = gradients_of(model, ids)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        found = {name: g.full_tensor() for name, g in gradients_of(sharded, ids).items()}
    finally:
        distributed.destroy_process_group()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_hooks_see_what_flows_between_layers():
    """A layer's argument is what it reads: a hook may change it."""
    model, ids = make_model("block", queries=0.3), make_ids()
    plain, seen = model(ids).logits, []

    def steer(layer, arguments, output):
        seen.append(output.shape)
        return 2 * output

    handle = model.model.layers[1].register_forward_hook(steer)
    steered = model(ids).logits
    handle.remove()
    assert seen == [(2, 21, 32)]
    assert not torch.allclose(steered, plain)
    layer = model.model.layers[1]
    layer.feed_forward.register_forward_hook(lambda module, arguments, output: 2 * output)
    assert torch.equal(model(ids).logits, steered)
