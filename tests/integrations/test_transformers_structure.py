"""What fits is found by what it computes; what does not is refused with the reason, untouched."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

from attnres_ext.integrations.transformers import attach, attention_residuals, detach
from attnres_ext.integrations.transformers.norms import recognise
from tests.integrations import tiny_models


def snapshot(model):
    """Everything that attaching may change."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "config": model.config.to_dict(),
        "modules": [
            (name, module.training, sorted(vars(module)), len(module._forward_hooks))
            for name, module in model.named_modules()
        ],
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["config"] == before["config"]
    assert after["modules"] == before["modules"]
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(t, before["tensors"][n]) for n, t in after["tensors"].items())


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("olmo2", {}, r"layers\.0\.self_attn\.q_proj reads .* without a norm .*post-norm"),
        ("cohere", {}, r"model\.layers\.0 adds .* twice .*parallel"),
        (
            "gpt_neox",
            {"use_parallel_residual": True},
            r"layers\.0\.post_attention_layernorm is the second norm .*parallel",
        ),
        ("opt", {"word_embed_proj_dim": 32}, r"decoder\.layers\.0 uses `\.reshape`"),
        ("openai-gpt", {}, r"transformer\.h\.0.* reads .* without a norm"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\\" not in value else "",
)
def test_layers_of_another_shape_are_refused(name, changes, says):
    model = tiny_models.make(name, **changes).train()
    model.base_model.eval()  # modes differ from module to module
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^attach: .* not of the pre-norm shape .*{says}"):
        attach(model)
    assert_unchanged(model, before)


def test_a_stream_in_another_dtype_is_refused():
    model = tiny_models.make("mamba", residual_in_fp32=True).bfloat16()
    with pytest.raises(
        ValueError, match=r"backbone\.layers\.0 casts or moves .* to torch\.float32"
    ):
        attach(model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "standard"}, "mode is 'standard', expected one of block, full"),
        ({"sublayers_per_block": 0}, "sublayers_per_block is 0, expected at least 1"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"save": "all"}, "save is 'all', expected one of"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, says):
    model = tiny_models.make("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        attach(model, **settings)
    assert_unchanged(model, before)


def test_what_is_no_decoder_is_refused():
    with pytest.raises(ValueError, match="model is a Linear, expected a transformers model"):
        attach(nn.Linear(2, 2))
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="no module that holds both the token embedding and"):
        attach(transformers.BertModel(config))


def test_a_model_without_values_that_asks_for_some_is_refused():
    with torch.device("meta"):
        model = tiny_models.make("gpt2")
    with pytest.raises(ValueError, match=r"on meta failed in transformer.* give it values first"):
        attach(model)


def test_attaching_twice_is_refused_and_detaching_restores():
    model = tiny_models.make("gemma2", head_dim=8)
    ids = tiny_models.tokens()
    expected = model(ids).logits
    before = snapshot(model)
    assert attach(model, sublayers_per_block=2) is model
    tiny_models.randomise(attention_residuals(model))
    assert not torch.allclose(model(ids).logits, expected)
    with pytest.raises(ValueError, match="already has Attention Residuals; detach first"):
        attach(model)
    assert detach(model) is model
    assert_unchanged(model, before)
    tiny_models.assert_same(model(ids).logits, expected)
    with pytest.raises(ValueError, match="detach: this Gemma2ForCausalLM has no Attention"):
        detach(model)
    with pytest.raises(ValueError, match="has no Attention Residuals"):
        attention_residuals(model)


def test_sublayers_are_counted_by_what_they_add():
    for name, count in {"llama": 6, "phi": 3, "mamba": 3, "gemma2": 6, "kimi_linear": 6}.items():
        assert attention_residuals(attach(tiny_models.make(name))).num_sublayers == count, name


def test_norms_are_known_by_what_they_compute():
    class Gemma(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16))
            self.small = 1e-4

        def forward(self, x):
            return x * (x.square().mean(-1, keepdim=True) + self.small).rsqrt() * (1 + self.weight)

    class Unit(nn.Module):
        def forward(self, x):
            return x / x.norm(dim=-1, keepdim=True)

    assert recognise(nn.RMSNorm(16, eps=1e-5), 16) == (1e-5, 0.0)
    assert recognise(Gemma(), 16) == (1e-4, 1.0)
    assert recognise(nn.RMSNorm(16, eps=1e-5, elementwise_affine=False), 16) == (None, 0.0)
    assert recognise(nn.LayerNorm(16), 16) == (None, 0.0)
    assert recognise(Unit(), 16) == (None, 0.0)
    others = nn.Identity(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(8, 16), nn.Embedding(1, 16)
    for other in (*others, nn.Dropout(), nn.Bilinear(1, 1, 1), nn.Conv1d(1, 1, 1)):
        assert recognise(other, 16) is None, other
