"""What people do with a model works with Attention Residuals attached: generate, checkpoint
activations, look at hidden states, compile, copy."""

import copy
import gc
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from attnres_ext.integrations.transformers import attach, attention_residuals, detach, passes
from tests.integrations import tiny_models
from tests.module.naive_residual import assert_as_exact_as_plain_pytorch


def attached(name="llama", num_hidden_layers=3, **settings):
    model = tiny_models.make(name, num_hidden_layers=num_hidden_layers)
    attach(model, **({"sublayers_per_block": 2} | settings))
    tiny_models.randomise(attention_residuals(model))
    return model


def gradients(model, ids):
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "kimi_linear"])
def test_generating_with_a_cache_is_generating_without(name):
    model = attached(name, sublayers_per_block=3)
    ids = tiny_models.tokens(2, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            chosen = model(expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, chosen[:, None]], 1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options, use_cache=True), expected)


def test_padding_on_the_left_changes_nothing():
    model = attached()
    ids = tiny_models.tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        actual = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(actual, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bloom", "gpt2"])
@pytest.mark.parametrize("settings", [{"sublayers_per_block": 3}, {"mode": "full"}], ids=str)
def test_activation_checkpointing_changes_no_gradient(name, settings):
    torch.manual_seed(0)
    settings = {"sublayers_per_block": None} | settings
    model = attached(name, **settings).train()
    ids = tiny_models.tokens()

    def seeded():
        torch.manual_seed(1)  # dropout
        return gradients(model, ids)

    expected = seeded()
    model.activation_checkpointing_enable()
    tiny_models.assert_same(seeded(), expected)


def test_activation_checkpointing_keeps_no_more_than_without_attention_residuals():
    def kept(model):
        """Bytes that a forward leaves for its backward."""
        gc.collect()
        before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
        loss = model(ids, labels=ids, use_cache=False).loss
        after = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in before]
        del loss
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in after}.values()
        )

    ids = tiny_models.tokens(4, 32)
    base = tiny_models.make("llama", num_hidden_layers=6).train()
    model = attach(copy.deepcopy(base), sublayers_per_block=4)
    for each in (base, model):
        each.activation_checkpointing_enable()
    assert kept(model) < 1.1 * kept(base)


def test_checkpoints_around_layers_change_no_gradient():
    model = attached(num_hidden_layers=4).train()
    ids = tiny_models.tokens()
    expected = gradients(model, ids)
    layers = model.model.layers
    for index in (0, 2, 3):
        layers[index] = checkpoint_wrapper(layers[index])
    found = gradients(model, ids)
    tiny_models.assert_same(
        {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found.items()}, expected
    )
    gc.collect()
    assert not passes._checkpointed


def test_reentrant_checkpointing_is_refused():
    model = attached().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    ids = tiny_models.tokens()
    with pytest.raises(RuntimeError, match="needs use_reentrant=False, the default"):
        model(ids)


def test_hidden_states_are_those_of_the_base_model():
    base = tiny_models.make("llama")
    ids = tiny_models.tokens()
    expected = base(ids, output_hidden_states=True)
    model = attach(base, sublayers_per_block=3)
    found = model(ids, output_hidden_states=True)
    plain = model(ids)
    tiny_models.assert_same(found.logits, plain.logits)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # One of them, and with gradients.
    tiny_models.randomise(attention_residuals(model))
    some = model(ids, output_hidden_states=[1]).hidden_states
    assert some[0] is None
    some[1].sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None
    assert model.model.layers[1].mlp.down_proj.weight.grad is None


@pytest.mark.parametrize("hidden_states", [False, True])
def test_what_is_added_between_layers_is_written(hidden_states):
    """A steering vector does to the attached model what it does to the base model."""
    base = tiny_models.make("llama")
    ids = tiny_models.tokens()
    vector = torch.randn(32)
    base.model.layers[1].register_forward_hook(lambda module, args, output: output + vector)
    expected = base(ids).logits
    actual = attach(base, sublayers_per_block=2)(ids, output_hidden_states=hidden_states).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_stream_in_float32():
    base = tiny_models.make("llama")
    ids = tiny_models.tokens()
    with torch.no_grad():
        exact = base(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            plain = base(ids).logits
            model = attach(base)
            actual = model(ids).logits
            stream = model(ids, output_hidden_states=True).hidden_states
    assert {hidden.dtype for hidden in stream} == {torch.float32}
    assert actual.dtype == plain.dtype
    assert_as_exact_as_plain_pytorch([actual], [plain], [exact])


def test_copies_are_models_of_their_own():
    model = attached()
    ids = tiny_models.tokens()
    expected = gradients(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        tiny_models.assert_same(gradients(twin, ids), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        changed = gradients(twin, ids)["lm_head.weight"]
        assert not torch.allclose(changed, expected["lm_head.weight"], rtol=1e-2)
        tiny_models.assert_same(gradients(model, ids), expected)
        detach(twin)
        tiny_models.assert_same(gradients(model, ids), expected)


def test_left_out_layers_are_noticed():
    model = attached()
    ids = tiny_models.tokens()
    expected = model(ids).logits
    layers = model.model.layers
    model.model.layers = layers[:2]
    with pytest.raises(RuntimeError, match="site 6 is read when site 4 is next; layers were left"):
        model(ids)
    model.model.layers = layers[1:]
    with pytest.raises(RuntimeError, match="site 2 is read when site 0 is next; layers were left"):
        model(ids)
    model.model.layers = layers
    tiny_models.assert_same(model(ids).logits, expected)
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        layers[0](torch.randn(1, 2, 32))


def test_threads_do_not_meet():
    model = attached()
    inputs = [tiny_models.tokens(1, 5 + i) for i in range(8)]
    expected = [model(ids).logits for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda ids: model(ids).logits, inputs))
    for actual, wanted in zip(results, expected, strict=True):
        tiny_models.assert_same(actual, wanted)


def test_recording_says_what_was_attended_to():
    model = attached()
    with attention_residuals(model).recording() as record:
        model(tiny_models.tokens())
    assert sorted(record.weights) == list(range(7))
    assert [len(weights) for weights in record.weights.values()] == [1, 2, 2, 3, 3, 4, 4]


def test_compiled_in_one_graph():
    model = attached(num_hidden_layers=1)
    ids = tiny_models.tokens()
    expected = gradients(model, ids)
    loss = torch.compile(lambda ids: model(ids, labels=ids).loss, backend="eager", fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss(ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_compiled_where_the_sublayer_comes_first_in_the_addition():
    model = attach(tiny_models.make("gpt_neox", num_hidden_layers=1))
    ids = tiny_models.tokens()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        tiny_models.assert_same(compiled(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize(("name", "strict"), [("llama", True), ("gpt2", False)])
def test_exported(name, strict):
    """With any number of tokens."""
    model, ids = attached(name, num_hidden_layers=2), tiny_models.tokens(2, 9)
    inputs = {"input_ids": ids, "use_cache": False}
    tokens = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=60)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=tokens, strict=strict)
        other = inputs | {"input_ids": tiny_models.tokens(2, 23)}
        actual, expected = program.module()(**other).logits, model(**other).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_layers_compiled_one_by_one(name):
    """Two graphs, for the first layer and for all others, and one each without gradients; phi's
    norms are none that a read does."""
    torch._dynamo.reset()
    model = attach(tiny_models.make(name, num_hidden_layers=5), sublayers_per_block=3)
    tiny_models.randomise(attention_residuals(model))
    ids = tiny_models.tokens()

    def found():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        return {"logits": logits, **{n: p.grad for n, p in model.named_parameters()}}

    expected, counter = found(), CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    actual = found()
    torch._dynamo.reset()
    assert counter.frame_count == 4
    for key, tensor in expected.items():
        tiny_models.assert_same(actual[key], tensor)
